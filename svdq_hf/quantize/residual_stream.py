"""The residual stream of a decoder: which layers read it, which write to it, and by which norms.

Found by running the model on one token and comparing tensors, so that no family need be known by name: a
norm's input is the stream, a reader's input is that norm's output, a writer's output is what is added before
the next norm reads. With a single token attention returns its values, which tells the layer that makes them
and how heads share them. Whatever does not fit (a norm behind a block, a scaled stream, experts) is refused
with the tensor that told. Not here: running it (`quantize.module_calls`), rotating it (`quantize.rotate`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdq_hf.quantize.code_inspection import is_linear
from svdq_hf.quantize.module_calls import Call, NotRotatable, one_token


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


def find_stream(model: nn.Module) -> ResidualStream:
    """The residual stream of a model, found by running it on one token.

    Args:
        model: a dense decoder with its head; it is left as it was.

    Raises:
        NotRotatable: its stream is not one that a rotation leaves intact; the module is named.
    """
    return _Search(model, one_token(model)).found()


class _Search:
    """The calls of one run, sorted into norms, readers and writers."""

    def __init__(self, model: nn.Module, calls: list[Call]) -> None:
        self.model, self.calls = model, calls
        self.norms: list[Call] = []
        self.writers: list[Call] = []
        self.offsets: set[int] = set()
        self.stream = calls[0].y
        last: Call | None = None  # the linear layer that ran last
        for call in calls[1:]:
            if not is_linear(call.module):
                self._norm(call, last)
            else:
                last = call

    def _norm(self, call: Call, last: Call | None) -> None:
        """Note a norm that reads the stream, and the layer that has written to it before."""
        if call.x.shape != self.stream.shape:
            return  # of queries and keys, head by head
        if not call.x.any():
            raise NotRotatable(
                f"{call.name} reads nothing but zeros, which does not tell where they are from"
            )
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
        self._check_copies([one for read in readers for one in read])
        self._check_complete()
        blocks = tuple(
            Block(norm.name, tuple(one.name for one in read), writer.name, self._heads(writer, read))
            for norm, read, writer in zip(self.norms, readers, self.writers, strict=False)
        )
        heads = tuple(one.name for one in readers[-1])
        return ResidualStream(self.calls[0].name, blocks, self.norms[-1].name, heads, max(self.offsets))

    def _readers(self, norm: Call) -> list[Call]:
        place = norm.y.data_ptr()
        linear = [one for one in self.calls if is_linear(one.module) and one.x.shape[-1] == norm.y.shape[-1]]
        found = [one for one in linear if one.x.data_ptr() == place]
        if not found:
            raise NotRotatable(
                f"no linear layer reads {norm.name}: where that is the last norm, load the model with its "
                "head (AutoModelForCausalLM)"
            )
        return found

    def _heads(self, writer: Call, readers: list[Call]) -> Heads | None:
        """Which reader's output the writer's input is, when attention sees one token; None: no attention."""
        owner = self.model.get_submodule(writer.name.rpartition(".")[0])
        size = getattr(owner, "head_dim", None)
        if not isinstance(size, int):
            return None
        if not writer.x.any():
            raise NotRotatable(
                f"{writer.name} reads nothing but zeros, which does not tell the values' layer"
            )
        found = [one for one in readers if _makes_values(one.y, writer.x, size)]
        if len(found) != 1:
            which = "no layer" if not found else "more than one layer"
            raise NotRotatable(
                f"{writer.name}: {which} beside it makes the values that it reads, head by head"
            )
        return Heads(found[0].name, found[0].y.shape[-1] // size, size)

    def _check_copies(self, readers: list[Call]) -> None:
        """Refuse linear layers that read copies of the stream, or of a norm's output."""
        known = {one.name for one in readers}
        tensors = [(norm.name, one) for norm in self.norms for one in (norm.x, norm.y)]
        for call in self.calls:
            if not is_linear(call.module) or call.name in known:
                continue
            for name, one in tensors:
                if call.x.shape == one.shape and torch.equal(call.x.float(), one.float()):
                    raise NotRotatable(f"{call.name} reads a copy of what {name} reads or answers")

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


def _makes_values(y: Tensor, x: Tensor, size: int) -> bool:
    """Whether `x` is `y`, each of its heads of `size` columns as often as query heads share it."""
    width = y.shape[-1]
    if width % size or x.numel() % width:
        return False
    seen, value = x.reshape(width // size, -1, size), y.reshape(width // size, 1, size)
    return torch.allclose(seen.float(), value.expand_as(seen).float(), rtol=1e-2)


def _offset(call: Call) -> int:
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
