import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from metricface.data.images import MemoryImages, Preprocessing, keep
from metricface.miners.dataset.embedding_file import embed_to_file


class Network(nn.Module):
    """A linear map that counts items, and breaks where told."""

    def __init__(self, columns: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(6, columns, bias=False)
        self.drop = nn.Dropout(0.5)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(seed))
        self.items = 0
        self.break_at = -1

    def forward(self, x: Tensor) -> Tensor:
        if 0 <= self.break_at < self.items + len(x):
            raise KeyboardInterrupt
        self.items += len(x)
        found: Tensor = self.drop(self.linear(x.flatten(1)))
        return found


INPUTS = torch.randn(103, 6, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(INPUTS, torch.arange(103))


def record_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name(path.name + ".json").read_text())
    return found


def expected(network: Network) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = network.linear(INPUTS).detach().numpy()
    return found


def test_each_item_is_embedded_in_order_in_eval_mode_and_modes_come_back(tmp_path: Path) -> None:
    network = Network()
    network.linear.eval()  # frozen, say, while the rest trains
    state = torch.get_rng_state()
    found = embed_to_file(network, DATA, tmp_path / "e.npy", batch_size=10)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert (found.dtype.name, found.shape) == ("float32", (103, 5))
    np.testing.assert_allclose(found, expected(network), atol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "e.npy", allow_pickle=False), found)
    assert (network.training, network.linear.training, network.drop.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert record_of(tmp_path / "e.npy") == {"rows": 103, "columns": 5, "dtype": "float32", "tag": "", "done": 103}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npy", "e.npy.json"]


@pytest.mark.parametrize("break_at", [1, 10, 60, 102])
def test_an_interrupted_call_is_gone_on_with_and_gives_the_same_file(tmp_path: Path, break_at: int) -> None:
    network = Network()
    network.break_at = break_at
    path = tmp_path / "e.npy"
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(network, DATA, path, batch_size=10)
    done = record_of(path)["done"] if break_at > 9 else 0
    assert done == network.items
    assert network.training
    network.break_at, network.items = -1, 0
    found = embed_to_file(network, DATA, path, batch_size=10)
    assert network.items == 103 - done
    whole = embed_to_file(network, DATA, tmp_path / "whole.npy", batch_size=10)
    np.testing.assert_array_equal(found, whole)
    network.items = 0
    np.testing.assert_array_equal(embed_to_file(network, DATA, path, batch_size=10), whole)
    assert network.items == 0  # all rows are there


KILLED = """
import os, signal, sys, torch
from metricface.miners.dataset import embedding_file
from tests.miners.dataset.test_embedding_file import DATA, Network

where, number = sys.argv[2], int(sys.argv[3])
embedding_file.SECONDS_BETWEEN_RECORDS = 0.0
inner = getattr(embedding_file, where)

def counted(*given):
    global number
    number -= 1
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*given)

setattr(embedding_file, where, counted)
embedding_file.embed_to_file(Network(), DATA, sys.argv[1], batch_size=10)
"""


@pytest.mark.parametrize(("where", "number", "least"), [("_create", 0, 0), ("_keep", 3, 30), ("_write_at", 5, 50)])
def test_a_killed_process_leaves_no_claim_to_rows_that_are_not_there(
    tmp_path: Path, where: str, number: int, least: int
) -> None:
    path = tmp_path / "e.npy"
    run = subprocess.run([sys.executable, "-c", KILLED, str(path), where, str(number)], cwd=Path(__file__).parents[3])
    assert run.returncode == -signal.SIGKILL
    assert record_of(path)["done"] == least
    network = Network()
    if least:
        np.testing.assert_allclose(np.load(path)[:least], expected(network)[:least], atol=1e-6)
    np.testing.assert_allclose(embed_to_file(network, DATA, path, batch_size=10), expected(network), atol=1e-6)
    assert network.items == 103 - least


def test_a_file_of_another_tag_length_type_or_width_is_an_error_that_says_how_to_start_afresh(tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    network = Network()
    network.break_at = 50
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(network, DATA, path, batch_size=10, tag="a")
    again = r"To start afresh, delete e\.npy and e\.npy\.json"
    with pytest.raises(ValueError, match=rf"begun with tag 'a', and asked is 'b'\. {again}"):
        embed_to_file(network, DATA, path, tag="b")
    with pytest.raises(ValueError, match=rf"begun with rows 103, and asked is 3\. {again}"):
        embed_to_file(network, TensorDataset(INPUTS[:3]), path, tag="a")
    with pytest.raises(ValueError, match=rf"begun with dtype 'float32', and asked is 'float16'\. {again}"):
        embed_to_file(network, DATA, path, tag="a", dtype=np.float16)
    with pytest.raises(ValueError, match=r"gave embeddings \(10, 4\) for the items from 50 on, where \(10, 5\)"):
        embed_to_file(Network(4), DATA, path, batch_size=10, tag="a")
    path.unlink()
    with pytest.raises(ValueError, match=rf"should hold \(103, 5\) float32 by its record; found .* else\. {again}"):
        embed_to_file(network, DATA, path, tag="a")
    (tmp_path / "e.npy.json").write_text("{}")
    with pytest.raises(ValueError, match="no record of an embedding file"):
        embed_to_file(network, DATA, path)


def _as_saved(array: np.ndarray[Any, Any]) -> bytes:
    written = io.BytesIO()
    np.save(written, array)
    return written.getvalue()


@pytest.mark.parametrize("done", [50, 103])
@pytest.mark.parametrize(
    "spoilt",
    [
        lambda whole: b"",
        lambda whole: whole[:200],
        lambda whole: whole + b"seven b",
        lambda whole: whole + bytes(20),
        lambda whole: b"no array at all",
        lambda whole: _as_saved(np.load(io.BytesIO(whole)).astype(np.float64)),
        lambda whole: _as_saved(np.load(io.BytesIO(whole)).astype(">f4")),
        lambda whole: _as_saved(np.asfortranarray(np.load(io.BytesIO(whole)))),
        lambda whole: _as_saved(np.array([None], dtype=object)),
    ],
)
def test_a_file_that_is_not_as_its_record_says_is_not_gone_on_with(
    tmp_path: Path, done: int, spoilt: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "e.npy"
    network = Network()
    network.break_at = done if done < 103 else -1
    with contextlib.suppress(KeyboardInterrupt):
        embed_to_file(network, DATA, path, batch_size=10)
    path.write_bytes(spoilt(path.read_bytes()))
    with pytest.raises(ValueError, match=r"should hold \(103, 5\) float32 by its record; found .*start afresh, delete"):
        embed_to_file(Network(), DATA, path, batch_size=10)


@pytest.mark.parametrize("dtype", [">f4", "<f4", "f4", "float32"])
def test_a_type_in_another_byte_order_is_the_type(tmp_path: Path, dtype: str) -> None:
    network = Network()
    found = embed_to_file(network, DATA, tmp_path / "e.npy", dtype=dtype)
    np.testing.assert_allclose(found, expected(network), atol=1e-6)
    assert found.dtype == np.float32


def test_a_file_that_is_not_ours_is_not_written_over(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"exists, but no record e\.npy\.json beside it"):
        embed_to_file(Network(), DATA, tmp_path / "e.npy")
    assert np.load(tmp_path / "e.npy").tolist() == [1.0, 1.0, 1.0]


def test_embeddings_that_are_not_finite_are_an_error_and_the_rows_before_stay(tmp_path: Path) -> None:
    inputs = INPUTS.clone()
    inputs[57], inputs[59, 2] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"2 of 10 embeddings .* \(first: item 57\)\. The 50 rows before it stay"):
        embed_to_file(Network(), TensorDataset(inputs), tmp_path / "e.npy", batch_size=10)
    assert record_of(tmp_path / "e.npy")["done"] == 50
    found = embed_to_file(Network(), DATA, tmp_path / "e.npy", batch_size=10)
    np.testing.assert_allclose(found, expected(Network()), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, "float32"])
def test_embeddings_of_any_precision_are_stored_as_asked(tmp_path: Path, dtype: Any) -> None:
    for network in (Network(), Network().bfloat16()):
        found = embed_to_file(
            network,
            TensorDataset(INPUTS.to(network.linear.weight.dtype)),
            tmp_path / f"{network.linear.weight.dtype}.npy",
            dtype=dtype,
        )
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_allclose(found, expected(Network()), atol=0.1)


def test_what_overflows_in_half_precision_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="infinity in float16"):
        embed_to_file(Network(), TensorDataset(1e6 * INPUTS), tmp_path / "e.npy", dtype=np.float16)


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="the disk is full: 103 embeddings of 5 float32 take"):
        embed_to_file(Network(), DATA, tmp_path / "e.npy")
    monkeypatch.undo()
    found = embed_to_file(Network(), DATA, tmp_path / "e.npy")  # the same call goes on once there is space
    np.testing.assert_allclose(found, expected(Network()), atol=1e-6)


def test_a_write_that_takes_a_part_only_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, bytes(data[:7]), place))
    found = embed_to_file(Network(), DATA, tmp_path / "e.npy", batch_size=50)
    np.testing.assert_allclose(found, expected(Network()), atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_set_is_embedded_through_its_own_batches(tmp_path: Path, workers: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 2, 1, 3), dtype=np.uint8)
    preprocessing = Preprocessing(2, 1)
    images = MemoryImages(pixels, ["a", "b"], np.arange(21) % 2, [str(i) for i in range(21)], preprocessing)
    network = Network()
    found = embed_to_file(
        network,
        images,
        tmp_path / "e.npy",
        batch_size=8,
        num_workers=workers,
        collate_fn=keep,
        prepare=lambda batch: preprocessing.to_input(batch.images),
    )
    inputs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    np.testing.assert_allclose(found, network.linear(inputs.flatten(1)).detach().numpy(), atol=1e-5)


class Endless(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return INPUTS[0]


def test_wrong_arguments_are_errors_and_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "e.npy"
    for arguments, message in (
        ({"batch_size": 0}, "batch_size must be"),
        ({"dtype": np.int8}, "dtype must be"),
        ({"dtype": "nonsense"}, "dtype must be"),
        ({"dtype": None}, "dtype must be"),
        ({"tag": b"x"}, "tag must be a string"),
        ({"prepare": lambda batch: {"x": batch}}, "'to'"),
    ):
        with pytest.raises((ValueError, AttributeError), match=message):
            embed_to_file(Network(), DATA, path, **arguments)
    for data in (Endless(), TensorDataset(INPUTS[:0])):
        with pytest.raises(ValueError, match="with a length of at least 1"):
            embed_to_file(Network(), data, path)
    for network in (nn.Flatten(0), nn.AdaptiveAvgPool1d(0)):
        with pytest.raises(ValueError, match="must give a floating tensor"):
            embed_to_file(network, DATA, path)
    with pytest.raises(ValueError, match="the loader gives dict"):
        embed_to_file(Network(), [{"x": 1.0}], path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
