"""The speed of a GPU, measured or read from a file, and what operations take by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luve_lightning.analysis.cost import REFERENCE, gpu_speed, named_speed, read_speed
from luve_lightning.analysis.dry_run import Operation

FIRST = (("compiler", 3), ("forward", 5), ("training", 0), ("something newer", 1))
RATES: dict[str, float] = dict.fromkeys((*REFERENCE.tflops, "block-sparse attention"), 100.0)


def speed_rows() -> list[dict[str, Any]]:
    rows = [
        {"kind": kind, "dtype": dtype, "tflops": rate / (4 if dtype == "float32" else 1), "keys": 4096}
        for kind, rate in RATES.items()
        for dtype in ("bfloat16", "float32")
    ]
    rows += [{"kind": "attention", "dtype": "bfloat16", "tflops": 400.0, "keys": 65536}]
    rows += [{"kind": "rest", "tb_per_second": 2.5, "memory_gib": 80.0}]
    return [{"subject": "speed", "gpu": "card", **row} for row in rows]


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_measured_speed_is_read_from_its_file(tmp_path: Path) -> None:
    old = {"subject": "speed", "gpu": "card", "kind": "matmul", "dtype": "bfloat16", "tflops": 1.0}
    rows = [{"subject": "vluer", "ms": 3}, old, *speed_rows()]
    speed = gpu_speed(str(written(tmp_path / "speed.jsonl", rows)), None)
    assert speed is not None
    assert (speed.name, speed.memory_gib, speed.bandwidth) == ("card", 80.0, 2.5)

    def seconds(kind: Any, dtype: torch.dtype = torch.bfloat16, keys: int = 0) -> float | None:
        return speed.seconds({Operation(kind, 10**14, 10, dtype, keys): 1})

    assert seconds("matmul") == 1
    assert seconds("block-sparse attention") == 1
    assert seconds("matmul", torch.float32) == 4
    # Attention is faster the more keys there are: measured at 4,096 and 65,536, on a logarithmic scale between them.
    rates = {keys: 100 / (seconds("attention", keys=keys) or 0) for keys in (100, 4096, 16384, 65536, 10**6)}
    assert rates == pytest.approx({100: 100, 4096: 100, 16384: 250, 65536: 400, 10**6: 400})
    twice = gpu_speed(str(tmp_path / "speed.jsonl"), 800)
    assert twice is not None
    assert (twice.tflops["matmul"], twice.by_keys[4096]) == (200, 200)


def test_first_uses_are_read_and_unknown_where_they_were_not_measured(tmp_path: Path) -> None:
    first = [{"subject": "speed", "gpu": "card", "kind": "first use", "of": of, "seconds": s} for of, s in FIRST]
    new = read_speed(written(tmp_path / "new.jsonl", [*speed_rows(), *first]))
    assert new.first_uses(["compiler", "forward", "forward"]) == 13
    assert new.first_uses([]) == 0
    assert new.first_uses(["forward", "kernels"]) is None
    old = read_speed(written(tmp_path / "old.jsonl", speed_rows()))
    assert (old.first_uses([]), old.first_uses(["forward"])) == (0, None)
    with pytest.raises(ValueError, match="first use: seconds: expected a number at least 0, got -1"):
        read_speed(written(tmp_path / "wrong.jsonl", [*speed_rows(), first[0] | {"seconds": -1}]))


@pytest.mark.parametrize("wrong", [{"tflops": 0}, {"tflops": "fast"}, {"tflops": -1.0}, {"gpu": "another"}])
def test_rows_of_two_gpus_and_rates_that_are_none_are_no_speed(tmp_path: Path, wrong: dict[str, Any]) -> None:
    first, *others = speed_rows()
    file = written(tmp_path / "speed.jsonl", [first | wrong, *others])
    message = "rows of several GPUs, another and card" if "gpu" in wrong else "tflops: expected a number above 0, got"
    with pytest.raises(ValueError, match=message):
        read_speed(file)


@pytest.mark.parametrize("text", ["", "{}", "nothing", "[1]", json.dumps(speed_rows()[0])])
def test_a_file_of_something_else_is_no_speed(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match="gpu: expected a file that luve bench --subject speed --output FILE wrote"):
        read_speed(tmp_path / "file")


@pytest.mark.parametrize(
    ("number", "edited", "told"),
    [
        (-1, {"kind": None}, "a row's kind is None; expected a text"),
        (-1, {"memory_gib": "80"}, "rest: memory_gib: expected a number at least 0, got '80'"),
        (-1, {"tb_per_second": 10**400}, "rest: tb_per_second: expected a number above 0, got 10+"),
        (-1, {"kind": "other", "dtype": "bfloat16", "tflops": 1}, "no row of rest, the memory's"),
        (0, {"keys": "4096"}, "attention: keys: expected a whole number above 0, got '4096'"),
        (0, {"keys": 0}, "attention: keys: expected a whole number above 0, got 0"),
        (0, {"tflops": True}, "attention: tflops: expected a number above 0, got True"),
        (0, {"gpu": 5}, "attention: gpu: expected a text, got 5"),
        (3, {"kind": "other"}, "no row of other in bfloat16"),
        (
            -2,
            {"kind": "attention backward", "keys": 128},
            "no row of attention in bfloat16 with the 128 keys of attention backward",
        ),
    ],
)
def test_a_row_that_was_edited_into_nonsense_is_named(
    tmp_path: Path, number: int, edited: dict[str, Any], told: str
) -> None:
    rows = speed_rows()
    rows[number] |= edited
    with pytest.raises(ValueError, match=rf" is none: {told}$"):
        read_speed(written(tmp_path / "speed.jsonl", rows))


def test_a_row_that_lacks_a_value_or_is_cut_off_is_named(tmp_path: Path) -> None:
    rows = speed_rows()
    file = written(tmp_path / "speed.jsonl", rows)
    text = file.read_text()
    file.write_text(text[:-20])
    with pytest.raises(ValueError, match=rf"speed.jsonl is none: line {len(rows)} is no JSON object$"):
        read_speed(file)
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"is none: line 1 is no JSON object$"):
        read_speed(file)
    for name in ("gpu", "dtype", "tflops", "keys"):  # without a GPU's name: measured on a CPU
        file.write_text(json.dumps({key: value for key, value in rows[0].items() if key != name}))
        with pytest.raises(ValueError, match=f"is none: a row of attention has no {name}$"):
            read_speed(file)


def test_a_name_or_path_of_nothing_is_told_with_what_would_be_right(tmp_path: Path) -> None:
    right = "expected h200 or a file that luve bench --subject speed --output FILE wrote on your GPU"
    missing = str(tmp_path / "missing")
    for kind, gpu, told in (
        (ValueError, "k80", f"gpu: {right}, got 'k80'"),
        (ValueError, "", f"gpu: {right}, got ''"),
        (ValueError, str(tmp_path), f"gpu: {tmp_path} is a folder; {right}"),
        (FileNotFoundError, missing, f"gpu: no such file: {missing}; {right}"),
        (FileNotFoundError, "speed.jsonl", f"gpu: no such file: speed.jsonl; {right}"),
    ):
        for speed, end in (
            (named_speed, ""),
            (lambda gpu: gpu_speed(gpu, None), "; or leave gpu out and give gpu_tflops"),
        ):
            with pytest.raises(kind) as refused:
                speed(gpu)
            assert str(refused.value) == told + end


def test_a_loader_brings_what_it_was_measured_to_bring(tmp_path: Path) -> None:
    row = {"subject": "speed", "gpu": "card", "kind": "loading", "workers": 8, "tb_per_second": 0.0005}
    assert read_speed(written(tmp_path / "old.jsonl", speed_rows())).loaded(10**9) == 0
    assert read_speed(written(tmp_path / "new.jsonl", [*speed_rows(), row])).loaded(10**9) == pytest.approx(2)
    bad = written(tmp_path / "bad.jsonl", [*speed_rows(), row | {"tb_per_second": 0}])
    with pytest.raises(ValueError, match="loading: tb_per_second: expected a number above 0, got 0"):
        read_speed(bad)


def test_a_training_step_is_launched_and_waited_for(tmp_path: Path) -> None:
    rows = [
        {"subject": "speed", "gpu": "card", "kind": "host", "of": of, "seconds": seconds}
        for of, seconds in (("operation", 0.001), ("step", 0.5))
    ]
    old, new = (
        read_speed(written(tmp_path / name, [*speed_rows(), *more])) for name, more in (("old", []), ("new", rows))
    )
    heavy, light = ({Operation("matmul", flops, 10, torch.bfloat16): 100} for flops in (10**14, 10**6))
    beside = {Operation("rest", 0, 10**6, torch.float32): 1}
    for passes in (heavy, light):
        assert old.training(passes, beside) == pytest.approx(old.seconds(passes) + old.seconds(beside))
    assert new.training(heavy, beside) == pytest.approx(old.seconds(heavy) + 0.5)
    assert new.training(light, beside) == pytest.approx(100 * 0.001 + 0.5)


def test_a_backward_pass_has_its_own_rate(tmp_path: Path) -> None:
    def seconds(speed: Any, kind: Any) -> float:
        return speed.seconds({Operation(kind, 10**14, 10, torch.bfloat16, 4096): 1})

    old = read_speed(written(tmp_path / "old.jsonl", speed_rows()))
    share = 2.5 * 352 / (1384 - 352)
    assert seconds(old, "attention backward") == pytest.approx(1 / share)
    assert seconds(old, "convolution backward") == 1
    rows = [
        {"kind": "attention backward", "dtype": "bfloat16", "tflops": 50.0, "keys": 4096},
        {"kind": "convolution backward", "dtype": "bfloat16", "tflops": 25.0},
    ]
    new = [*speed_rows(), *({"subject": "speed", "gpu": "card"} | row for row in rows)]
    speed = read_speed(written(tmp_path / "new.jsonl", new))
    assert seconds(speed, "attention backward") == pytest.approx(2)
    assert seconds(speed, "convolution backward") == pytest.approx(4)
    assert speed.seconds({Operation("nothing backward", 1, 1, torch.float32): 1}) is None  # type: ignore[arg-type]
