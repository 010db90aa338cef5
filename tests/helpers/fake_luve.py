"""Stands in for `python -m luve_lightning` in tests of the ablation runner: starts in an instant, does little.

    fit        leaves a checkpoint and weights; reads --ckpt_path
    generate   writes value.txt: --value plus the seed
    evaluate   writes the report of the folders given as --videos.NAME

Every verb takes --sleep SECONDS, --fail true and --wait FILE (until it is there), and appends a line to $FAKE_LOG when
it starts and when it ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def note(event: str, verb: str, folder: Path, options: dict[str, str]) -> None:
    line = {"event": event, "verb": verb, "stage": folder.name, "pid": os.getpid(), "options": options}
    line["env"] = {key: os.environ.get(key) for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    with Path(os.environ["FAKE_LOG"]).open("a") as log:
        log.write(json.dumps(line) + "\n")


def main() -> int:
    verb, *words = sys.argv[1:]
    options = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    output = Path(options.get("trainer.default_root_dir") or options["output"])
    folder = output.parent if output.suffix else output
    note("start", verb, folder, options)
    time.sleep(float(options.get("sleep", 0)))
    while "wait" in options and not Path(options["wait"]).exists():
        time.sleep(0.02)
    if options.get("fail") == "true":
        print("first line")
        print("it broke here", file=sys.stderr)
        return 3
    folder.mkdir(parents=True, exist_ok=True)
    if verb == "fit":
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "last.ckpt").write_text("weights")
        (folder / "adapter_model.safetensors").write_text("weights")
    elif verb == "generate":
        (folder / "value.txt").write_text(str(float(options.get("value", 0)) + float(options.get("seed", 0))))
    elif verb == "evaluate":
        videos = {key.removeprefix("videos."): Path(value) for key, value in options.items() if "videos." in key}
        methods = {
            name: {"n": 1, "metrics": {"score": {"value": float((path / "value.txt").read_text())}}}
            for name, path in videos.items()
        }
        report = {"methods": methods, "not_run": {"absent": "needs a network"}}
        (folder / "table.json").write_text(json.dumps(report))
    note("end", verb, folder, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
