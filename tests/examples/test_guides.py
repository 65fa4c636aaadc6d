"""The code blocks of the guides run, one after another, as a reader would run them."""

import re
from pathlib import Path

import pytest
import torch

GUIDES = sorted((Path(__file__).parents[2] / "examples" / "guides").glob("*.md"))


def blocks(guide: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if blocks(guide)], ids=lambda guide: guide.stem)
def test_the_code_of_a_guide_runs_from_top_to_bottom(guide: Path) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks(guide):
        exec(block, names)
    if not any(".backward()" in block for block in blocks(guide)):
        return  # not about losses
    embeddings = names.get("embeddings")
    assert isinstance(embeddings, torch.Tensor)
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()
