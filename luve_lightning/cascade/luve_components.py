"""What LuVePipeline is made of: its components, their files, and LoRAs loaded into them."""

# No `from __future__ import annotations`: diffusers reads the types of `__init__` as they are.

import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from luve_lightning.cascade.adapters import experts_set_aside, plain_loras
from luve_lightning.cascade.denoise import switch_expert
from luve_lightning.cascade.lora_files import LoraFile, read_lora
from luve_lightning.cascade.lora_layers import LoraSummary, check_loaded, fit_lora
from luve_lightning.models.backbones import Schedule, SizeRules, load_backbone
from luve_lightning.models.experts import expert_names, load_expert, save_expert
from luve_lightning.models.experts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, EXPERT
from luve_lightning.models.folders import is_local, loading, read_config, saving
from luve_lightning.models.vluer import VLUer

EXPERTS = "experts"  # the folder of a saved pipeline that holds one folder for each expert


class LuVeComponents(WanPipeline):
    """Wan2.1's pipeline with what LuVe's second and third stage need.

    Args:
        tokenizer: of the text encoder.
        text_encoder: UMT5.
        vae: Wan2.1's.
        scheduler: UniPC with flow sigmas, as Wan's pipelines have it.
        transformer: of the first stage and of direct generation.
        refiner: of the third stage, adapted to the high resolution and with the experts; None where `transformer`
            serves both, and has the experts.
        vluer: of the second stage; None where latents or pixels are interpolated instead.
        transformer_2: Wan2.2's; must be None, as the two options that go with it.
        boundary_ratio: see there.
        expand_timesteps: see there.

    Raises:
        ValueError: for a Wan2.2 backbone, and a VLUer for other latents.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vluer->refiner->vae"
    _optional_components = ["transformer", "transformer_2", "refiner", "vluer"]  # noqa: RUF012
    _lora_loadable_modules = ["transformer", "refiner"]  # noqa: RUF012

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: UMT5EncoderModel,
        vae: AutoencoderKLWan,
        scheduler: UniPCMultistepScheduler,
        transformer: WanTransformer3DModel,
        refiner: WanTransformer3DModel | None = None,
        vluer: VLUer | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
    ) -> None:
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            raise ValueError("the backbone is a Wan2.2 one (transformer_2, boundary_ratio): expected Wan2.1")
        if vluer is not None and vluer.config.latent_channels != vae.config.z_dim:
            raise ValueError(
                f"the VLUer takes {vluer.config.latent_channels} latent channels, the VAE has {vae.config.z_dim}"
            )
        super().__init__(tokenizer, text_encoder, vae, scheduler, transformer)
        self.register_modules(refiner=refiner, vluer=vluer)

    @property
    def refinement_transformer(self) -> WanTransformer3DModel:
        """The transformer of the third stage, which has the experts."""
        return self.transformer if self.refiner is None else self.refiner

    @property
    def transformers(self) -> list[WanTransformer3DModel]:
        """Every transformer once."""
        return [self.transformer] if self.refiner is None else [self.transformer, self.refiner]

    @property
    def size_rules(self) -> SizeRules:
        """What height, width and frames of a video must be multiples of."""
        vae, patch = self.vae.config, self.transformer.config.patch_size
        return SizeRules(vae.scale_factor_spatial * patch[1], vae.scale_factor_temporal * patch[0])

    @classmethod
    def from_pretrained(
        cls,
        backbone: str | Path,
        vluer: str | Path | VLUer | None = None,
        experts: str | Path | Mapping[str, str | Path] | None = None,
        refiner: str | Path | WanTransformer3DModel | None = None,
        torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        shift: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a backbone and what is added to it, or what `save_pretrained` wrote.

        Args:
            backbone: a pipeline folder or a hub id.
            vluer: a folder written by `VLUer.save_pretrained`.
            experts: a folder with one folder for each expert (lfe/ and hfe/, as training exports them), or folders by
                the experts' names. None takes those saved with the pipeline, {} none.
            refiner: the transformer of the third stage: a folder written by its `save_pretrained`, or a backbone.
            torch_dtype: of the weights; float32 when None. A dtype is that of the transformers and the text encoder:
                the VAE and the VLUer stay float32, as Wan's own examples have it. A mapping from components to dtypes
                ("default" for the others) says otherwise.
            shift: of the schedule; None keeps the backbone's. LuVe and Wan at 720p take 5, Wan at 480p 3.
            kwargs: of diffusers' `from_pretrained`; components themselves, for instance, or `dtype`, its newer name
                for `torch_dtype`.

        Raises:
            FileNotFoundError: when something is not there.
            ValueError: when parts do not fit together.
        """
        local = is_local(backbone)
        if local and not (Path(backbone) / "model_index.json").is_file():
            raise FileNotFoundError(
                f"backbone {backbone}: no model_index.json there; expected a diffusers pipeline folder"
            )
        dtypes = _dtypes(kwargs.pop("dtype", torch_dtype))
        if isinstance(vluer, str | Path):
            if not (Path(vluer) / "config.json").is_file():
                raise FileNotFoundError(
                    f"vluer {vluer}: no config.json there; expected a folder saved by VLUer"
                )
            vluer = VLUer.from_pretrained(vluer, dtype=dtypes.get("vluer", dtypes["default"]))
        if isinstance(refiner, str | Path):
            refiner = load_backbone(refiner).denoiser(dtypes.get("refiner", dtypes["default"])).module
        given = {"vluer": vluer, "refiner": refiner}
        components = kwargs | {name: part for name, part in given.items() if part is not None}
        if local:
            components = _whole_parts(Path(backbone), dtypes, components) | components
        with loading(backbone, "components"):
            pipeline = super().from_pretrained(
                str(backbone), dtype=dtypes, local_files_only=local, **components
            )
        Schedule(pipeline.scheduler, backbone)  # refuses one that is not of flow matching
        if shift is not None:
            if not 0 < shift < float("inf"):
                raise ValueError(f"shift: expected a number greater than 0, got {shift}")
            scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, flow_shift=shift)
            pipeline.scheduler = scheduler
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        own = Path(backbone) / EXPERTS
        if experts is None and local and own.is_dir():
            experts = own
        for name, folder in expert_folders(experts).items():
            load_expert(pipeline.refinement_transformer, folder, name)
        switch_expert(pipeline.refinement_transformer, None)
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write everything that `from_pretrained` reads back, bit for bit, the experts in folders of their own.

        The folder without its experts/ is a pipeline folder of diffusers; an expert's folder is PEFT's.

        Raises:
            ValueError: while LoRAs are loaded: they would come back as experts or not at all.
        """
        for part in self.transformers:
            if loras := plain_loras(part):
                raise ValueError(
                    f"the LoRA {loras[0]!r} is loaded, which a saved pipeline does not keep: unload it first"
                )
        folder, transformer = Path(save_directory), self.refinement_transformer
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with saving(folder) as new:
            with experts_set_aside(transformer):
                super().save_pretrained(str(new), **kwargs)
            for name in expert_names(transformer):
                save_expert(transformer, name, new / EXPERTS / name)
            if (folder / EXPERTS).is_dir():  # an earlier save's, of which some may not be there any more
                (new / EXPERTS).mkdir(exist_ok=True)
        if (folder / EXPERTS).is_dir() and not expert_names(transformer):
            shutil.rmtree(folder / EXPERTS)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor] | LoraFile,
        adapter_name: str | None = None,
        into: str = "both",
        **kwargs: Any,
    ) -> LoraSummary:
        """Load a LoRA for Wan2.1 beside the experts, for instance UltraWan's; it is active then.

        diffusers' names of the layers are understood, and the original model's as ComfyUI, kohya's trainers and
        DiffSynth-Studio write them. A LoRA is loaded whole, at the scale its tensors, its file's header or PEFT's
        `adapter_config.json` beside it say, or not at all. `set_adapters`, `delete_adapters` and the like are
        diffusers'; experts are chosen by the stages whatever these chose.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a hub id, the weights or what `read_lora` read.
            adapter_name: default diffusers' choice.
            into: "transformer" (first stage, direct generation), "refiner" (third stage), or "both".
            kwargs: of `read_lora`, such as `weight_name`.

        Returns:
            What was loaded, at which scale.

        Raises:
            FileNotFoundError: when it is not there.
            ValueError: for a LoRA of which something cannot be loaded, and an unknown `into`.
        """
        if into not in ("both", "transformer", "refiner"):
            raise ValueError(f"into: expected both, transformer or refiner, got {into!r}")
        file = read_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        chosen = {
            "transformer": [self.transformer],
            "refiner": [self.refinement_transformer],
            "both": self.transformers,
        }[into]
        fitted = []
        for transformer in chosen:  # all of them before the first is touched
            with experts_set_aside(transformer):
                fitted.append(fit_lora(transformer, file))
        for transformer, lora in zip(chosen, fitted, strict=True):
            with experts_set_aside(transformer):
                there = set(getattr(transformer, "peft_config", {}))
                with warnings.catch_warnings():  # several adapters are what we mean
                    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
                    self.load_lora_into_transformer(
                        dict(lora.state_dict),
                        transformer,
                        adapter_name,
                        metadata=lora.metadata,
                        _pipeline=self,
                    )
                (new,) = set(transformer.peft_config) - there
                check_loaded(transformer, new, lora)
            switch_expert(transformer, None)
        return fitted[0].summary

    def unload_lora_weights(self) -> None:
        """Remove every LoRA; the experts stay."""
        for transformer in self.transformers:
            with experts_set_aside(transformer):
                transformer.unload_lora()


def expert_folders(experts: str | Path | Mapping[str, str | Path] | None) -> dict[str | None, Path]:
    """Folders of experts by their names; None for the name that a single expert was saved with.

    Raises:
        FileNotFoundError: for a folder without experts.
    """
    if experts is None:
        return {}
    if isinstance(experts, Mapping):
        return {name: Path(folder) for name, folder in experts.items()}
    folder = Path(experts)
    if (folder / "expert.json").is_file():
        return {None: folder}
    # A folder with a part of an expert's files is one too, and refused where it is loaded.
    found: dict[str | None, Path] = {
        path.parent.name: path.parent
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, EXPERT)
        for path in sorted(folder.glob(f"*/{name}"))
    }
    found = {name: found[name] for name in sorted(found, key=str)}
    if not found:
        raise FileNotFoundError(
            f"experts {folder}: no expert there; expected folders such as lfe/ and hfe/ with an expert.json"
        )
    return found


def _whole_parts(
    backbone: Path, dtypes: Mapping[str, torch.dtype], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The parts of a pipeline folder that are not given, each checked to be whole; diffusers would not."""
    index = read_config(backbone, "", "model_index.json")
    read_config(backbone, "scheduler", "scheduler_config.json")
    parts = load_backbone(backbone)
    loaders: dict[str, Callable[[torch.dtype], Any]] = {
        "tokenizer": lambda _: parts.tokenizer(),
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
        "transformer": lambda dtype: parts.denoiser(dtype).module,
        "refiner": lambda dtype: parts.denoiser(dtype, "refiner").module,
    }
    if any(name not in index and name not in ("vluer", "refiner") for name in given):
        return {}  # options of diffusers, such as a variant of the weights
    found = {name: index.get(name) for name in loaders if name not in given}
    return {
        name: loaders[name](dtypes.get(name, dtypes["default"]))
        for name, kind in found.items()
        if isinstance(kind, list) and None not in kind
    }


def _dtypes(torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None) -> dict[str, torch.dtype]:
    if isinstance(torch_dtype, Mapping):
        return {"default": torch.float32} | dict(torch_dtype)
    return {"default": torch_dtype or torch.float32, "vae": torch.float32, "vluer": torch.float32}
