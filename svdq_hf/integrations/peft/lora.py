"""LoRA layer of PEFT (arXiv 2106.09685) on a quantized layer.

PEFT finds it by `integrations.peft.patches`; adapters are stored as PEFT stores them for a dense model.
Merging rounds, so PEFT's own merge is refused here. Not here: DoRA and other variants, which need the dense
weight at every step (refused); adapters of a whole model (`integrations.peft.adapters`).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdq_hf.core.release import how_to_install
from svdq_hf.format.encode import decompose
from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.integer_linear import SVDQIntegerLinear
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.nn.linear import SVDQLinear

try:
    from peft import PeftModel as PeftModel  # for adapters.py too, which needs the same extra
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError(f"adapters need an extra: {how_to_install('peft')}") from error

STARTS: tuple[bool | str, ...] = (True, False, "gaussian", "orthogonal", "eva")
"""Values of LoraConfig's `init_lora_weights` that do not change the layer's own weight."""

MERGING = (
    "merging rounds the adapter to the base's few bits: svdq_hf.adapters.merge_adapters(model) does it and "
    "says what it costs; to merge exactly, dequantize_model(model.get_base_model()) first, or load the "
    "adapter on the dense base, merge, and quantize that"
)


def lora_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> "SVDQLoraLinear | None":
    """The LoRA layer for a target, which PEFT asks for; None where the target is not a quantized layer.

    Args:
        target: the layer, or PEFT's wrapper of it.
        adapter_name: name of the adapter.
        config: PEFT's LoraConfig.
        **kwargs: further arguments of PEFT's LoRA layer.

    Raises:
        ValueError: the target is packed experts, or a layer that rounds its activations; see also
            `SVDQLoraLinear`.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, SVDQExperts):  # PEFT's target_parameters: it would add to the codes
        raise ValueError(
            "adapters on packed experts, whose codes are no matrix to add to (PEFT asks for them by "
            "target_parameters, which it fills in itself where target_modules is 'all-linear'): name the "
            "other layers, target_modules=['q_proj', 'v_proj'] for instance, or keep the experts dense with "
            "modules_to_not_convert=['experts']"
        )
    if isinstance(base, SVDQIntegerLinear):
        raise ValueError(
            "a layer that rounds its activations has no gradient to train an adapter by: train it on the "
            "dense model, or on one that is quantized without activations"
        )
    if type(base) is not SVDQLinear:  # a packed embedding is one too, and does not multiply
        return None
    return SVDQLoraLinear(target, adapter_name, config=config, **kwargs)


def linear_names(model: nn.Module) -> set[str]:
    """Quantized layers that "all-linear" includes: all except the output head and those inside an adapter."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {
        name
        for name, layer in svdq_layers(model)
        if layer is not head and type(layer) is SVDQLinear and not (inside and name.startswith(inside))
    }


def check_whole(model: nn.Module, config: Any) -> None:
    """Refuse to train packed modules completely, or rows of a packed embedding.

    Args:
        model: a quantized model.
        config: a PEFT config.

    Raises:
        ValueError: `modules_to_save` or `trainable_token_indices` of the config selects a quantized module.
    """
    whole = getattr(config, "modules_to_save", None) or []
    whole = [whole] if isinstance(whole, str) else whole
    rows = getattr(config, "trainable_token_indices", None)
    for name, module in model.named_modules():
        saved = any(name == one or name.endswith(f".{one}") for one in whole)
        packed = isinstance(module, SVDQLinear | SVDQExperts | TiedEmbedding)
        embedding = rows is not None and isinstance(module, SVDQEmbedding | TiedEmbedding)
        if (saved and packed) or embedding:
            choice = "modules_to_save" if saved else "trainable_token_indices"
            raise ValueError(
                f"{choice}: {name} is quantized and cannot be trained whole; keep it dense "
                "(modules_to_not_convert; lm_head or embeddings left out)"
            )


class SVDQLoraLinear(LoraLinear):  # type: ignore[misc]  # PEFT ships no types
    """`y = base(x) + scaling * B(A(x))`, x `[..., in]` -> y `[..., out]`: PEFT's LoRA layer on an SVDQLinear.

    Raises:
        ValueError: the config needs the dense weight (DoRA, init_lora_weights="pissa"); PEFT merges the
            layer; or an adapter is loaded that does not fit.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # a quantized layer is [out, in] also where it stands for a Conv1D

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter, after checking that its config does not need the dense weight.

        Raises:
            ValueError: `init_lora_weights` would change the dense weight.
        """
        if config.init_lora_weights not in STARTS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the dense weight, which a quantized "
                f"layer does not have: must be one of {STARTS}; init_adapters_from_error(model, dense) of "
                "svdq_hf.adapters starts from what quantizing lost"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
        """Refuse every variant of LoRA.

        Raises:
            ValueError: the config selects a variant, such as DoRA.
        """
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            asked = "use_dora" if config.use_dora else str(error)
            raise ValueError(
                f"{asked}: on a quantized layer only plain LoRA works; leave it out, or keep the layers dense"
            ) from error

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA only."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge where the base has been dequantized.

        Raises:
            ValueError: the base is quantized.
        """
        base = self.get_base_layer()
        if not isinstance(base, SVDQLinear):
            self.fan_in_fan_out = isinstance(base, Conv1D)
            super().merge(safe_merge, adapter_names)
        else:
            asked = set(self.active_adapters if adapter_names is None else adapter_names)
            if asked & set(self.lora_A.keys()) - set(self.merged_adapters):
                raise ValueError(MERGING)

    def unmerge(self) -> None:
        """Unmerge where the base has been dequantized.

        Raises:
            ValueError: the base is quantized: the weight before rounding is lost.
        """
        if self.merged and isinstance(self.get_base_layer(), SVDQLinear):
            raise ValueError("an adapter that was merged and rounded cannot be unmerged; load the base again")
        super().unmerge()

    def delta(self, adapters: list[str]) -> Tensor:
        """The sum that adapters add to the weight, `[out, in]`, float32."""
        base = self.get_base_layer()
        total = torch.zeros(base.out_features, base.in_features, device=base.weight.device)
        for name in set(adapters) & set(self.lora_A.keys()):
            up, down = self.lora_B[name].weight.detach(), self.lora_A[name].weight.detach()
            total += self.scaling[name] * (up.float() @ down.float())
        return total

    def why_not_merge(self, adapters: list[str]) -> str | None:
        """The reason why `requantize` is impossible; None where it is possible."""
        mine = [name for name in adapters if name in self.lora_A]
        if self.disable_adapters:
            return "its adapters are switched off; merge outside of disable_adapter()"
        if self.get_base_layer().bias is None and any(self.lora_bias[name] for name in mine):
            return "the adapter has a bias (lora_bias=True) and the layer has none to add it to"
        if not torch.isfinite(self.delta(mine)).all():
            return "the adapter has a NaN or an infinity"
        return None

    def requantize(self, adapters: list[str]) -> float:
        """Add adapters to the base's weight and quantize the sum; the same entries stay salient.

        Args:
            adapters: their names.

        Returns:
            Size of the rounding error over size of the adapters' change; 0 where there is no change.
        """
        base, delta = self.get_base_layer(), self.delta(adapters)
        mine = [name for name in adapters if name in self.lora_A]
        for name in mine:
            if self.lora_bias[name]:
                base.bias.data += self.scaling[name] * self.lora_B[name].bias.detach().to(base.bias.dtype)
        self.merged_adapters.extend(mine)
        if not delta.any():
            return 0.0
        weight = base.dequantize() + delta
        base.load_parts(decompose(weight, base.salient_rows, base.salient_columns, base.scheme))
        base.facts = {}  # they told of the original
        return float((base.dequantize() - weight).norm() / delta.norm())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        _, unexpected, _ = lists
        for name in self.lora_A:
            _check_fits(self, state_dict, prefix, name, unexpected)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def _check_fits(
    layer: SVDQLoraLinear, state_dict: Mapping[str, Tensor], prefix: str, name: str, unexpected: list[str]
) -> None:
    """Refuse an adapter of another base: of other shapes, or with layers that this model lacks.

    (An adapter that lacks layers cannot be told from another state dict; PEFT warns of that.)
    """
    parts = {
        "lora_A": (layer.r[name], layer.in_features),
        "lora_B": (layer.out_features, layer.r[name]),
    }
    found = {part: state_dict.get(f"{prefix}{part}.{name}.weight") for part in parts}
    if all(tensor is None for tensor in found.values()):
        return  # it is something else that is being loaded
    other = f"adapter {name!r} was trained for another base model:"
    strange = [key for key in unexpected if ".lora_A." in key]
    if strange:
        raise ValueError(f"{other} it has weights for {_layer_name(strange[0])}, which this model has not")
    for part, shape in parts.items():
        tensor = found[part]
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{other} {part} of {_layer_name(prefix)} is {list(tensor.shape)}, here {list(shape)}"
            )


def _layer_name(key: str) -> str:
    return key.partition(".lora_")[0].removeprefix("base_model.model.").rstrip(".")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, SVDQLoraLinear]]:
    """The quantized layers that have adapters, by their names in the base model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, module in base.named_modules():
        if isinstance(module, SVDQLoraLinear) and isinstance(module.get_base_layer(), SVDQLinear):
            yield name, module
