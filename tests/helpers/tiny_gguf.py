"""Small models in GGUF files, as llama.cpp's converter would write them."""

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf

HEADS, SHARED, WIDTH, INNER, VOCABULARY, LAYERS = 4, 2, 64, 96, 80, 2


PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MATRICES = ["token_embd.weight", "output.weight"] + [
    f"blk.{layer}.{part}.weight" for layer in range(LAYERS) for part in PARTS
]


def llama(*, spread=1.0, **choices):
    """A Llama of two layers whose columns differ in size, as those of trained models do.

    spread: standard deviation of the logarithms of the columns' sizes.
    """
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": SHARED, "max_position_embeddings": 128}
    config = hf.LlamaConfig(**{**sizes, **heads, "vocab_size": VOCABULARY, **choices})
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            sizes = torch.exp(spread * torch.randn(weight.shape[-1]))
            weight.copy_(sizes if weight.ndim == 1 else torch.randn_like(weight) * sizes * 0.05)
            if "embed" in name or "lm_head" in name:
                weight.copy_(torch.randn_like(weight))
    return model


def write(
    model, path: Path, kind=np.float32, *, drop=(), add=None, arch="llama", last_token=b"t", **metadata
) -> Path:
    """Write a Llama into a GGUF file.

    kind: of its matrices. drop: names left out. add: further tensors by name. last_token: of the vocabulary.
    metadata: further keys, with "_" for "."; "alignment" is the file's.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(1)
    writer.add_tokenizer_model("none")
    writer.add_token_list(
        [last_token, *(f"t{number}".encode() for number in range(1, config.vocab_size))][::-1]
    )
    if "alignment" in metadata:
        writer.add_custom_alignment(metadata.pop("alignment"))
    for key, value in metadata.items():
        getattr(writer, "add_string" if isinstance(value, str) else "add_uint32")(
            key.replace("_", "."), value
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {names.get_name(name, (".weight",)): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in {**tensors, **(add or {})}.items():
        if name not in drop:
            _add(writer, name, _permuted(name, tensor.float(), config), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, name, tensor, kind) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.numpy())
    elif kind == "BF16":
        data = tensor.bfloat16().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, tensor.numpy().astype(kind))


def _permuted(name, tensor, config):
    """Rows of q and k in llama.cpp's order of rotary pairs."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.split(".")[2] if name.count(".") == 3 else "")
    if count is None:
        return tensor
    return tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def logits(path: Path, tokens):
    """What transformers computes with a GGUF file."""
    loaded = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return loaded.eval()(tokens).logits


def tensor(path: Path, name: str) -> torch.Tensor:
    """A tensor of a file, dequantized by gguf."""
    found = next(one for one in gguf.GGUFReader(path).tensors if one.name == name)
    data = gguf.quants.dequantize(found.data, found.tensor_type)
    return torch.from_numpy(np.array(data)).float().reshape(*reversed(found.shape.tolist()))
