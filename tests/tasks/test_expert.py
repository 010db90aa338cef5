"""Training one expert: what changes, what is saved, and what the test pass compares."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from luve_lightning.callbacks import EMA, AtomicCheckpointIO, Checkpoints, Export
from luve_lightning.models.experts import expert_parameters, load_expert
from luve_lightning.tasks import ExpertTask
from tests.helpers.run_luve import run_luve
from tests.helpers.tiny_flow import LFE, World, make_trainer
from tests.helpers.tiny_wan import load_transformer, output, randomise

REPOSITORY = Path(__file__).resolve().parents[2]
MINI = [REPOSITORY / "experiments/experts/mini-lfe.yaml", REPOSITORY / "tests/conf/experts/mini-lfe.yaml"]
HFE = [REPOSITORY / "experiments/experts/mini-hfe.yaml", REPOSITORY / "tests/conf/experts/mini-hfe.yaml"]


def weights(task: ExpertTask) -> list[torch.Tensor]:
    return [p.detach().clone() for p in expert_parameters(task.transformer, "lfe")]


def test_only_the_expert_is_trained_saved_and_exported(world: World, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = world.expert(lr=1e-2, recompute="all_but_attention")
    base = load_transformer(world.backbone).state_dict()
    first = weights(task)
    ema = EMA(0.5)
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        enable_checkpointing=True,
        plugins=AtomicCheckpointIO(),
        callbacks=[Checkpoints(100), ema, Export(tmp_path / "lfe")],
    )
    trainer.fit(task, world.data())
    assert all(not torch.equal(a, b) for a, b in zip(weights(task), first, strict=True))
    state = {k.replace(".base_layer", ""): v for k, v in task.transformer.state_dict().items()}
    assert all(torch.equal(state[k], v) for k, v in base.items()), "the base has moved"
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert len(saved) == len(first)
    assert all("lora_" in name and ".lfe." in name for name in saved)
    copy = load_transformer(world.backbone)
    assert load_expert(copy, tmp_path / "lfe") == "lfe"
    arguments = sample()
    with torch.no_grad():
        assert not torch.equal(output(copy, arguments), output(task.transformer, arguments))
        with ema.averaged(task):
            assert torch.equal(output(copy, arguments), output(task.transformer, arguments))


def test_the_paper_may_mean_both_attentions(capsys: pytest.CaptureFixture[str], world: World, tmp_path: Path) -> None:
    """One key of the configuration of real size; each block then has an expert in both, and both are trained."""
    words = ("--config", REPOSITORY / "experiments/experts/lfe-2k.yaml", "--print_config")
    places = {}
    for given in ((), ("--model.init_args.expert.place", "[attention, cross_attention]")):
        outcome = run_luve(capsys, "fit", *words, *given)
        assert outcome.code == 0, outcome.err
        places[len(given)] = yaml.safe_load(outcome.out)["model"]["init_args"]["expert"]["place"]
    assert places == {0: "attention", 2: ["attention", "cross_attention"]}
    task = world.expert(replace(LFE, place=tuple(places[2])), lr=1e-2)
    names = [name for name, p in task.transformer.named_parameters() if p.requires_grad]
    sites = {(name.split(".")[1], name.split(".")[2]) for name in names}
    blocks = range(len(task.denoiser.blocks))
    assert sites == {(str(block), site) for block in blocks for site in ("attn1", "attn2")}
    first = weights(task)
    make_trainer(tmp_path, max_steps=3).fit(task, world.data())
    assert all(not torch.equal(a, b) for a, b in zip(weights(task), first, strict=True))


def sample() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 3, 6, 6, generator=generator),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 16, 16, generator=generator),
    }


@pytest.mark.slow
def test_the_comparison_is_with_the_base_and_training_helps(world: World, tmp_path: Path) -> None:
    """Trained on the very clips that are measured, after losses computed without any expert."""
    measured = world.resplit(tmp_path / "world", train="val", val="test", test="train")
    torch.manual_seed(0)
    task = world.expert(replace(LFE, rank=16, alpha=32), lr=3e-2, bins=3)
    trainer = make_trainer(tmp_path, max_steps=60)
    trainer.fit(task, world.data(batch_size=4, passes=60, drop_caption=0.0))
    (found,) = trainer.test(task, measured.data(batch_size=3), verbose=False)

    base = world.expert(bins=3)
    base.transformer.disable_adapters()
    data = measured.data(batch_size=1)
    data.setup("test")
    with torch.no_grad():
        want = {k: v for batch in data.test_dataloader() for k, v in base.fixed_losses(batch).items()}
    assert len(task.comparison) == 4
    for clip, (before, after) in task.comparison.items():
        assert before == pytest.approx(sum(want[clip, part] for part in range(3)) / 3, rel=1e-5)
        assert after < before
    assert found["test/loss_before"] == pytest.approx(sum(want.values()) / 12, rel=1e-5)
    assert found["test/loss_after"] < 0.99 * found["test/loss_before"]


def test_a_bfloat16_base_with_a_float32_expert(world: World, tmp_path: Path) -> None:
    exact = world.expert()
    task = world.expert(dtype="bfloat16")
    assert task.transformer.dtype == torch.bfloat16
    assert {p.dtype for p in weights(task)} == {torch.float32}
    for precision in ("32-true", "bf16-mixed"):
        make_trainer(tmp_path, max_steps=1, precision=precision).fit(task, world.data())
    data = world.data()
    data.setup("validate")
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        got, want = (model.fixed_losses(batch) for model in (task, exact))
    assert got == pytest.approx(want, rel=0.02)
    assert got != want
    # Embeddings as `luve embed` stores them for Wan2.1.
    batch["text"] = batch["text"].bfloat16()
    assert exact.fixed_losses(batch) == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_continuing_from_a_saved_expert(world: World, tmp_path: Path) -> None:
    first = world.expert()
    randomise(first.transformer, "lfe")
    first.transformer.half()
    first.export(tmp_path, None)
    task = world.expert(init_from=str(tmp_path))
    for new, old in zip(expert_parameters(task.transformer, "lfe"), weights(first), strict=True):
        assert new.requires_grad
        assert new.dtype == torch.float32, "a saved float16 expert trains in float32"
        assert torch.equal(new, old.float())
    assert sum(p.requires_grad for p in task.parameters()) == len(weights(first))
    for change, message in (
        ({"rank": 8}, "has rank 4, `expert` says 8"),
        ({"filter": None}, "has filter FrequencyFilter.* `expert` says None"),
        ({"place": "feed_forward"}, r"has places \('attention',\), `expert` says \('feed_forward',\)"),
    ):
        with pytest.raises(ValueError, match=f"init_from: the expert in {tmp_path} {message}"):
            world.expert(replace(LFE, **change), init_from=str(tmp_path))


@pytest.fixture
def tiny_run(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the overlays in tests/conf refer to; the run folder, in which a run leaves its files."""
    names = {"BACKBONE": world.backbone, "WORLD": world.clips, "LATENTS": world.latents, "TEXTS": world.texts}
    for name, value in names.items():
        monkeypatch.setenv(f"TINY_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "lfe"


def luve_test(capsys: pytest.CaptureFixture[str], folder: Path, files: list[Path], *words: str) -> Any:
    options = [word for file in files for word in ("--config", str(file))]
    options += ["--trainer.default_root_dir", str(folder), "--trainer.accelerator", "cpu"]
    return run_luve(capsys, "test", *options, "--callbacks.progress", "null", *words)


@pytest.mark.slow
def test_untrained_experts_change_nothing(capsys: pytest.CaptureFixture[str], tiny_run: Path) -> None:
    """`luve test` without a checkpoint: B is zero, so before is after; both experts share one table."""
    assert (outcome := luve_test(capsys, tiny_run, MINI)).code == 0, outcome.err
    assert (outcome := luve_test(capsys, tiny_run.with_name("hfe"), [*MINI, *HFE])).code == 0, outcome.err
    assert (outcome := luve_test(capsys, tiny_run, MINI)).code == 0, outcome.err
    with (tiny_run.parent / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["expert", "before", "after"]
    assert [row["expert"] for row in rows] == ["hfe", "lfe"], "a row again replaces the row before"
    for row in rows:
        assert float(row["before"]) > 0
        assert row["before"] == row["after"]
        assert [float(row[name]) for name in ("difference", "low", "high")] == [0, 0, 0]
        assert int(row["clips"]) == 1


def luve_fit(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> Any:
    one_step = Path(__file__).parents[1] / "conf" / "one_step.yaml"
    options = [word for file in (*MINI, one_step) for word in ("--config", str(file))]
    loggers = ["--loggers.wandb", "null", "--loggers.csv", "null"]
    options += ["--trainer.default_root_dir", str(folder), "--callbacks.progress", "null", *loggers]
    return run_luve(capsys, "fit", *options, *words)


@pytest.mark.slow
def test_a_weighting_is_named_by_its_import_path(capsys: pytest.CaptureFixture[str], tiny_run: Path) -> None:
    weighting = "--model.init_args.weighting"
    name = "luve_lightning.functional.noise_bands.LogitNormalWeighting"
    outcome = luve_fit(capsys, tiny_run, weighting, name, f"{weighting}.std", "0.5")
    assert outcome.code == 0, outcome.err
    assert "std: 0.5" in (tiny_run / "config.yaml").read_text()
    outcome = luve_fit(capsys, tiny_run, f"{weighting}.class_path", "logit_normal")
    assert outcome.code == 2
    assert "weighting" in outcome.error_lines[-1]


@pytest.mark.slow
def test_a_run_resumes_as_the_same_expert_only(capsys: pytest.CaptureFixture[str], tiny_run: Path) -> None:
    assert (outcome := luve_fit(capsys, tiny_run)).code == 0, outcome.err
    last = tiny_run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    for words, message in (
        (["--model.init_args.expert.filter.cutoff", "0.25"], "checkpoint is of another expert: filter {"),
        (["--model.init_args.expert.band.low", "0.5"], "checkpoint is of another expert: band {"),
        (["--model.init_args.expert.rank", "8"], "checkpoint is of another expert: rank "),
        (["--model.init_args.expert.alpha", "5"], "checkpoint is of another expert: alpha "),
        (["--model.init_args.expert.place", "feed_forward"], "checkpoint is of another expert: place "),
        (["--model.init_args.name", "hfe"], "checkpoint is of another expert: name lfe there, hfe here"),
    ):
        outcome = luve_fit(capsys, tiny_run, "--ckpt_path", "last", *words)
        assert outcome.code == 2
        assert message in outcome.error_lines[-1]
    # A mistake in the data does not put the run aside; a new run does, and `last` does not begin anew behind it.
    assert luve_fit(capsys, tiny_run, "--data.init_args.variant", "sharper").code == 2
    assert last.read_bytes() == before
    assert (outcome := luve_test(capsys, tiny_run, MINI, "--ckpt_path", str(last))).code == 0, outcome.err
    table = (tiny_run.parent / "losses.csv").read_text()
    assert (outcome := luve_test(capsys, tiny_run, MINI)).code == 0, outcome.err
    assert (tiny_run.parent / "losses.csv").read_text() == table, "an untrained expert replaces no result"
    (tiny_run / "checkpoints").rename(tiny_run / "checkpoints-1")
    outcome = luve_fit(capsys, tiny_run, "--ckpt_path", "last")
    assert outcome.code == 2
    assert "checkpoints-1/last.ckpt: give that path to resume it" in outcome.error_lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt_path", "last"], "ckpt_path: no last checkpoint in "),
        (["--model.init_args.backbone", "runs/a/export"], "backbone runs/a/export: no such folder; expected a"),
        (["--model.init_args.dtype", "float16"], "dtype: expected float32 or bfloat16, got 'float16'"),
        (["--model.init_args.name", "lora_x"], "expert name 'lora_x': expected letters, digits"),
        (["--model.init_args.init_from", "nowhere"], "no expert in nowhere: expert.json is missing"),
        (["--model.init_args.expert.rank", "0"], "expert rank 0: expected an integer >= 1"),
        (["--model.init_args.expert.band.low", "1"], "a band of sigmas needs 0 <= low < high <= 1"),
        (["--data.init_args.variant", "sharper"], "1 of 1 clip has no latents in "),
        (["--data.init_args.texts", "nowhere"], "nowhere: no such embeddings for encoder any"),
        (["--data.init_args.columns", "[Title]"], "columns: 'Title' is no caption column; known: "),
        (["--data.init_args.test_limit", "0"], "test_limit: expected at least 1 clip, or null for all, got 0"),
        (["--callbacks.losses.init_args.output", "l.md"], "output: expected a file that ends in .csv, got l.md"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tiny_run: Path, words: list[str], message: str
) -> None:
    outcome = luve_test(capsys, tiny_run, MINI, *words)
    assert outcome.code == 2, outcome.err
    (line,) = [line for line in outcome.error_lines if not line.startswith(("GPU", "TPU", "HPU"))]
    assert message in line
