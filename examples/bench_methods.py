"""What each method of quantizing on the fly can do, through transformers, on a CPU: tried, not looked up.

    python examples/bench_methods.py                         # a tiny random Llama and Mixtral
    python examples/bench_methods.py --model FOLDER          # and the seconds that loading takes

One row a method: loaded on the fly, saved and loaded again, dequantized, a LoRA step, experts quantized. What
fails is in the table with the first words of its error. A peer that is not installed is left out.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import svdq_hf

SIZES = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
TOKENS = torch.tensor([[1, 17, 42, 8, 5]])


def _torchao() -> Any:
    from torchao.prototype.quantization.int4 import inference_workflow  # the layout for CPUs

    return hf.TorchAoConfig(inference_workflow.PrototypeInt4WeightOnlyConfig(group_size=64))


METHODS: dict[str, tuple[str, torch.dtype, Callable[[], Any]]] = {
    "svdq": ("svdq_hf", torch.float32, svdq_hf.SVDQConfig),
    "bitsandbytes NF4": (
        "bitsandbytes",
        torch.float32,
        lambda: hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    "HQQ": ("hqq", torch.bfloat16, lambda: hf.HqqConfig(nbits=4, group_size=64)),
    "torchao int4": ("torchao", torch.bfloat16, _torchao),
    "quanto int4": ("optimum.quanto", torch.float32, lambda: hf.QuantoConfig(weights="int4")),
    "SINQ": ("sinq", torch.bfloat16, lambda: hf.SinqConfig(nbits=4, group_size=64)),
}


def load(folder: Path, dtype: torch.dtype, config: Callable[[], Any]) -> Any:
    """A model, quantized while it is loaded."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=dtype)


def on_the_fly(folder: Path, *choice: Any) -> str:
    """Seconds, and whether it answers."""
    started = time.perf_counter()
    model = load(folder, *choice)
    seconds = time.perf_counter() - started
    with torch.no_grad():
        return f"yes, {seconds:.1f} s" if model(TOKENS).logits.isfinite().all() else "yes, with NaN"


def save(folder: Path, dtype: torch.dtype, config: Callable[[], Any]) -> str:
    """Whether a saved model is the same when it is loaded again."""
    model = load(folder, dtype, config)
    with tempfile.TemporaryDirectory() as out, torch.no_grad():
        model.save_pretrained(out)
        again = hf.AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        return "yes" if torch.equal(again(TOKENS).logits, model(TOKENS).logits) else "yes, and differs"


def dequantize(folder: Path, *choice: Any) -> str:
    """Whether the layers are dense afterwards, and the outputs about the same."""
    model = load(folder, *choice).dequantize()
    with torch.no_grad():
        before = load(folder, *choice)(TOKENS).logits
        layer, after = model.model.layers[0].self_attn.q_proj, model(TOKENS).logits
    same = torch.allclose(after.float(), before.float(), rtol=0.05, atol=0.01)
    return "yes" if type(layer) is torch.nn.Linear and same else "no"


def lora(folder: Path, *choice: Any) -> str:
    """Whether PEFT puts adapters on the layers and gradients reach them."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(folder, *choice), LoraConfig(target_modules=["q_proj"], r=4)).train()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return "yes" if any(one.grad is not None for one in model.parameters()) else "no gradient"


def experts(folder: Path, *choice: Any) -> str:
    """Whether the fused experts of a Mixtral are smaller than they were."""
    module = load(folder, *choice).model.layers[0].mlp.experts
    dense = 3 * 4 * SIZES["hidden_size"] * SIZES["intermediate_size"]
    stored = sum(one.numel() * one.element_size() for one in [*module.parameters(), *module.buffers()])
    return "yes" if stored < dense else "no"  # a byte a weight: between 4 bits and 16


def attempt(test: Callable[..., str], *arguments: Any) -> str:
    """The answer, or why there is none."""
    try:
        return test(*arguments)
    except Exception as error:
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:60]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal model, for the seconds of loading")
    options = parser.parse_args()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        llama, mixtral = Path(temporary) / "llama", Path(temporary) / "mixtral"
        hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)).save_pretrained(llama)
        sparse = hf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        hf.MixtralForCausalLM(sparse).save_pretrained(mixtral)
        print("| method | on the fly | save | dequantize | LoRA | experts |\n|---|---|---|---|---|---|")
        for name, (package, *choice) in METHODS.items():
            if importlib.util.find_spec(package.partition(".")[0]) is None:
                continue
            first = attempt(on_the_fly, llama, *choice)
            if options.model is not None:  # now that the method's package is imported
                first = attempt(on_the_fly, options.model, *choice)
            rest = [attempt(test, llama, *choice) for test in (save, dequantize, lora)]
            print(f"| {' | '.join([name, first, *rest, attempt(experts, mixtral, *choice)])} |", flush=True)


if __name__ == "__main__":
    main()
