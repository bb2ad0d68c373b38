"""The residual stream of a decoder: which layers read it, which write to it, and by which norms.

Found by running the model on one token and comparing tensors, so that no family need be known by name: a
norm's input is the stream, a reader's input is that norm's output, a writer's output is what is added before
the next norm reads. With a single token attention returns its values, which tells the layer that makes them
and how heads share them. Whatever does not fit (a norm behind a block, a scaled stream, experts) is refused
with the tensor that told. Not here: rotating it (`quantize.rotate`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import evaluating
from svdq_hf.quantize.code_inspection import is_linear


class NotRotatable(ValueError):
    """The model's stream cannot be rotated; the message says at which module, and why."""


@dataclass(frozen=True)
class Heads:
    """The heads that a block's output layer reads.

    Attributes:
        value: name of the layer that makes the values.
        count: of key and value heads; query heads that share one are next to each other.
        size: columns of a head.
    """

    value: str
    count: int
    size: int


@dataclass(frozen=True)
class Block:
    """Attention or feed-forward: a norm, the layers that read it, and the one that writes to the stream.

    Attributes:
        norm: name of the RMSNorm.
        readers: names of the linear layers whose input is its output.
        writer: name of the linear layer whose output is added to the stream.
        heads: what the writer reads in attention; None in a feed-forward block.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    heads: Heads | None


@dataclass(frozen=True)
class ResidualStream:
    """Everything that touches the residual stream of a model.

    Attributes:
        embedding: name of the input embedding, where the stream starts.
        blocks: in the order in which they run.
        norm: name of the last RMSNorm.
        heads: names of the layers that read it.
        offset: what a norm adds to its weight before it multiplies: 0, in some families 1.
    """

    embedding: str
    blocks: tuple[Block, ...]
    norm: str
    heads: tuple[str, ...]
    offset: int = 0

    @property
    def reads(self) -> list[tuple[str, tuple[str, ...]]]:
        """Each norm with the layers that read it, the last one included."""
        return [*((block.norm, block.readers) for block in self.blocks), (self.norm, self.heads)]


@dataclass(frozen=True)
class _Call:
    """One call of a module: its name, input and output."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


def find_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a model, found by running it on one token.

    Args:
        model: a dense decoder with its head; it is left as it was.

    Raises:
        NotRotatable: its stream is not one that a rotation leaves intact; the module is named.
    """
    calls = _one_token(model)
    return _Search(model, calls).found()


class _Search:
    """The calls of one run, sorted into norms, readers and writers."""

    def __init__(self, model: nn.Module, calls: list[_Call]) -> None:
        self.model, self.calls = model, calls
        self.norms: list[_Call] = []
        self.writers: list[_Call] = []
        self.offsets: set[int] = set()
        self.stream = calls[0].y
        last: _Call | None = None  # the linear layer that ran last
        for call in calls[1:]:
            if not is_linear(call.module):
                self._norm(call, last)
            else:
                last = call

    def _norm(self, call: _Call, last: _Call | None) -> None:
        """Note a norm that reads the stream, and the layer that has written to it before."""
        if call.x.shape != self.stream.shape:
            return  # of queries and keys, head by head
        if last is not None and torch.equal(call.x, self.stream + last.y):
            self.writers.append(last)
        elif not (torch.equal(call.x, self.stream) and not self.norms):
            after = last is not None and torch.equal(call.x, last.y)
            what = f"normalizes the output of {last.name}" if after and last else "reads something else"
            raise NotRotatable(
                f"{call.name} {what}, where a rotation needs norms in front of blocks alone, and blocks "
                "whose last linear layer is added to the stream as it is (Llama, Qwen2, Qwen3, Mistral)"
            )
        self.offsets.add(_offset(call))
        self.stream = call.x
        self.norms.append(call)

    def found(self) -> ResidualStream:
        if len(self.norms) < 2 or len(self.writers) != len(self.norms) - 1:
            raise NotRotatable(f"{type(self.model).__name__} has no blocks that a norm precedes")
        readers = [self._readers(norm) for norm in self.norms]
        self._check_complete()
        blocks = tuple(
            Block(norm.name, tuple(one.name for one in read), writer.name, self._heads(writer, read))
            for norm, read, writer in zip(self.norms, readers, self.writers, strict=False)
        )
        heads = tuple(one.name for one in readers[-1])
        return ResidualStream(self.calls[0].name, blocks, self.norms[-1].name, heads, max(self.offsets))

    def _readers(self, norm: _Call) -> list[_Call]:
        place = norm.y.data_ptr()
        found = [one for one in self.calls if is_linear(one.module) and one.x.data_ptr() == place]
        if not found:
            raise NotRotatable(
                f"no linear layer reads {norm.name}: where that is the last norm, load the model with its "
                "head (AutoModelForCausalLM)"
            )
        return found

    def _heads(self, writer: _Call, readers: list[_Call]) -> Heads | None:
        """Which reader's output the writer's input is, when attention sees one token; None: no attention."""
        owner = self.model.get_submodule(writer.name.rpartition(".")[0])
        size = getattr(owner, "head_dim", None)
        if not isinstance(size, int):
            return None
        for reader in readers:
            width, count = reader.y.shape[-1], reader.y.shape[-1] // size
            if width % size or writer.x.numel() % width:
                continue
            seen, value = writer.x.reshape(count, -1, size), reader.y.reshape(count, 1, size)
            if torch.allclose(seen.float(), value.expand_as(seen).float(), rtol=1e-2):
                return Heads(reader.name, count, size)
        raise NotRotatable(f"{writer.name}: no layer beside it makes the values that it reads, head by head")

    def _check_complete(self) -> None:
        """Refuse matrices that did not run, or not as linear layers: they might read the stream unseen."""
        ran = [one.module for one in self.calls]
        for name, module in self.model.named_modules():
            if ran.count(module) > 1:
                raise NotRotatable(f"{name} runs more than once")
            own = module.named_parameters(recurse=False)
            matrix = next((key for key, one in own if one.ndim > 1), None)
            if matrix and module not in ran:
                raise NotRotatable(f"{name}.{matrix} is of no linear layer that runs with every token")


def _offset(call: _Call) -> int:
    """What an RMSNorm adds to its weight: it answers `x / rms(x) * (offset + weight)`."""
    x, y, weight = call.x.float(), call.y.float(), getattr(call.module, "weight", None)
    weight = weight.detach() if isinstance(weight, Tensor) else None
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _epsilon(call.module))
    for offset in (0, 1):
        if weight is not None and weight.shape == x.shape[-1:]:
            own = unit * (offset + weight.float())
            if torch.allclose(own, y, rtol=2e-2, atol=1e-3 * float(own.abs().max())):
                return offset
    raise NotRotatable(f"{call.name} ({type(call.module).__name__}) is no RMSNorm, x / rms(x) * weight")


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)


def _one_token(model: Any) -> list[_Call]:
    """The calls of a model's embedding, linear layers and norms for one token, in order."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise NotRotatable(f"{type(model).__name__} has no input embedding, where a stream would start")
    calls: list[_Call] = []
    token = torch.ones(1, 1, dtype=torch.long, device=embedding.weight.device)
    try:
        with _recorded(model, embedding, calls), evaluating(model):
            model(input_ids=token, use_cache=False)
    except (TypeError, ValueError) as error:  # it wants more than tokens, or has no cache: no decoder
        kind = type(model).__name__
        raise NotRotatable(f"{kind} does not run as a decoder on one token: {error}") from error
    return calls


@contextmanager
def _recorded(model: nn.Module, embedding: nn.Module, calls: list[_Call]) -> Iterator[None]:
    """Context manager: calls of the model's embedding, linear layers and norms are appended to `calls`."""

    def watch(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, given: tuple[Any, ...], y: Any) -> None:
            if given and isinstance(y, Tensor):
                calls.append(_Call(name, module, given[0], y))

        return module.register_forward_hook(note)

    watched = [
        watch(name, module)
        for name, module in model.named_modules()
        if module is embedding or is_linear(module) or _may_be_norm(module)
    ]
    try:
        yield
    finally:
        for hook in watched:
            hook.remove()


def _may_be_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return bool(own) and all(one.ndim == 1 for one in own.values()) and not list(module.children())
