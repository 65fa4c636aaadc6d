"""Images with identities: where they come from, how they are split, and lists of pairs among them."""
