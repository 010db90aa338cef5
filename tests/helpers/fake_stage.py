"""Stands in for `python -m luve_lightning` in tests of rehearsals: starts in an instant, does what its values say.

Values of its last configuration, a YAML file:

    record      measured.json: a training that counts steps up to `steps`, finishing one at SIGTERM as a real one does
    files       folder that gets `count` files instead, one after another
    forget      begins again when it is resumed
    child       file that gets the number of a process that it starts and leaves behind
    compile     file that gets the folder of what is compiled and whether it was there
    say, code   printed, and the exit status
    kill        ends by SIGKILL
    ask         file that must be there

`plan` writes the GPU's speed that it was given; a value `slow` of its stage is the seconds that it takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

STEP_SECONDS = 0.05


def train(values: dict[str, Any], record: Path) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    state = record.with_name("last")
    began = step = 0 if values.get("forget") or not state.exists() else int(state.read_text())
    while step < values["steps"]:
        time.sleep(STEP_SECONDS)
        step += 1
        took = {"seconds_per_unit": 0.5, "first_seconds": 2.0, "peak_gib": 3.0, "unit": "step", "done": step - began}
        unfinished = record.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"began": began, "step": step, **took}))
        unfinished.replace(record)
        if asked:
            state.write_text(str(step))
            return 128 + asked[0]
    return 0


def main() -> int:
    verb, *words = sys.argv[1:]
    if verb == "plan":
        found = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
        time.sleep(found.get("slow", 0))
        Path(words[words.index("--output") + 1]).write_text(json.dumps({"gpu": words[words.index("--gpu") + 1]}))
        return 0
    values = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text())
    if "child" in values:
        child = subprocess.Popen(["sleep", "60"])
        with Path(values["child"]).open("a") as file:
            file.write(f"{child.pid}\n")
    if "compile" in values:
        place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        with Path(values["compile"]).open("a") as file:
            file.write(f"{place} {place.exists()}\n")
        place.mkdir(parents=True, exist_ok=True)
    if "ask" in values and not Path(values["ask"]).exists():
        print(f"no {values['ask']}")
        return 2
    if values.get("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    print(values.get("say", verb), file=sys.stderr)
    if "record" in values:
        Path(values["record"]).parent.mkdir(parents=True, exist_ok=True)
        return train(values, Path(values["record"]))
    for number in range(values.get("count", 0)):
        Path(values["files"]).mkdir(parents=True, exist_ok=True)
        Path(values["files"], f"{number}.txt").touch()
        time.sleep(STEP_SECONDS)
    return int(values.get("code", 0))


if __name__ == "__main__":
    sys.exit(main())
