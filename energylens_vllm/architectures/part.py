"""Parts of layers, as text, and how they are put together: the shared grammar of the families.

Rank names are the same in every family:

`t` tokens, `s` sampled rows, `c` context (`cs` of a sliding window, `cc` of a chunk), `d` hidden, `h` query heads,
`g` KV heads, `e` head dimension, `f` intermediate of the dense MLP, `r` router outputs, `x` experts, `m` intermediate
of an expert, `j` intermediate of the shared experts, `v` vocabulary; latent attention adds its own (`latent.py`).

The residual stream is `R`; `X` is what the last sublayer adds to it; `A` and `B` are the inputs of attention and MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from energylens_vllm.architectures.config import Config
from energylens_vllm.einsum import Cascade, Rank, block, build_cascade
from energylens_vllm.einsum.sharding import layer_sequence

Size = Rank | int | str


@dataclass(frozen=True, slots=True)
class Part:
    """Kernels (name -> einsums), with the sizes of the ranks and the kinds of the tensors that they bring along.
    `tied`: weight -> the weight whose memory it is."""

    kernels: Mapping[str, Sequence[str]]
    ranks: Mapping[str, Size] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)


def join(*parts: Part) -> Part:
    """One part after the other."""
    kernels: dict[str, Sequence[str]] = {}
    for part in parts:
        assert not kernels.keys() & part.kernels.keys(), "two kernels of one name"
        kernels |= part.kernels
    return Part(kernels, _ranks(parts), _tensors(parts), _tied(parts))


def decoder(
    config: Config, layer: Callable[[str], Part], sequence: Sequence[str] | None = None, softcap: bool = False
) -> Cascade:
    """The whole network: embedding, layers, head. `sequence` says of which kind each layer is (None: all are "layer"),
    and `layer` makes a kind.

    `softcap` says that logits pass through a scaled tanh, which vLLM's `LogitsProcessor` runs as three kernels.
    """
    if sequence is None:
        sequence = ["layer"] * config.size("num_hidden_layers")
    counts = {kind: sequence.count(kind) for kind in dict.fromkeys(sequence)}
    layers = {kind: layer(kind) for kind in counts}
    first, last = _embedding(config), _head(softcap)
    parts = [first, *layers.values(), last]
    head = {"WH": "E"} if config.flag("tie_word_embeddings", default=False) else {}
    return build_cascade(
        config.name,
        ranks=_ranks(parts),
        tensors=_tensors(parts),
        blocks=[
            block("embed", first.kernels),
            *(block(kind, part.kernels, counts[kind]) for kind, part in layers.items()),
            block("head", last.kernels),
        ],
        tied=head | _tied(parts),
        order=_cycle(sequence, counts),
    )


def _embedding(config: Config) -> Part:
    return Part(
        {"embed": ["X[t,d] = gather(E[v,d], I[t])"]},
        {
            "t": "tokens",
            "d": config.size("hidden_size"),
            "v": Rank(config.size("vocab_size"), split="tp", pad=64),  # vLLM's DEFAULT_VOCAB_PADDING_SIZE
        },
        {"plain": "E", "input": "I"},
    )


def _head(softcap: bool) -> Part:
    capped = {
        "softcap_divide": ["LS[s,v] = scale(L[s,v])"],
        "softcap_tanh": ["LT[s,v] = tanh(LS[s,v])"],
        "softcap_multiply": ["LC[s,v] = scale(LT[s,v])"],
    }
    return Part(
        {
            "norm": ["R[t,d] = R[t,d] + X[t,d]", "Y[t,d] = rmsnorm(R[t,d]) * NF[d]"],
            "last": ["Z[s,d] = gather(Y[t,d], LAST[s])"],
            "lm_head": ["L[s,v] = Z[s,d] * WH[v,d]"],
            **(capped if softcap else {}),
            "sample": [f"TOK[s] = sample({'LC' if softcap else 'L'}[s,v])"],
        },
        {"s": "sampled"},
        {"plain": "NF WH", "input": "LAST"},
    )


def norm(kernel: str, output: str, weight: str) -> Part:
    """The residual addition and the norm after it, one kernel."""
    return Part(
        {kernel: ["R[t,d] = R[t,d] + X[t,d]", f"{output}[t,d] = rmsnorm(R[t,d]) * {weight}[d]"]},
        tensors={"plain": weight},
    )


def pre_normed(attention: Part, feed_forward: Part) -> Part:
    """A layer with a norm before each of its sublayers."""
    return join(norm("input_norm", "A", "N1"), attention, norm("post_norm", "B", "N2"), feed_forward)


def _ranks(parts: Iterable[Part]) -> dict[str, Size]:
    ranks: dict[str, Size] = {}
    for part in parts:
        for name, size in part.ranks.items():
            assert ranks.setdefault(name, size) == size, f"rank {name} has two sizes"
    return ranks


def _tensors(parts: Iterable[Part]) -> dict[str, str]:
    names: dict[str, dict[str, None]] = {}
    for part in parts:
        for kind, text in part.tensors.items():
            names.setdefault(kind, {}).update(dict.fromkeys(text.split()))
    return {kind: " ".join(each) for kind, each in names.items()}


def _tied(parts: Iterable[Part]) -> dict[str, str]:
    return {weight: other for part in parts for weight, other in part.tied.items()}


def _cycle(sequence: Sequence[str], counts: Mapping[str, int]) -> Sequence[str]:
    """The shortest `order` of a cascade that spells this sequence of layers."""
    for length in range(len(sequence)):
        cycle = sequence[:length]
        if (not cycle or set(cycle) == set(counts)) and layer_sequence(counts, cycle) == list(sequence):
            return cycle
    return sequence
