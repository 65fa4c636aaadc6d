"""The parts that the built-in face set is drawn with: draws, people, conditions, canvas, portrait, camera."""
