"""The most bytes that a rank needs in a training step, from the configuration alone: state, and activations.
README.md has what weighs most of it.

State, in bytes, with P parameters on W ranks, and a bucket of B numbers, DeepSpeed's reduce_bucket_size. `kept` is
there from step to step; on top of it comes for a while what backward or what the optimizer's step needs.

    fp32     0   kept       4 P weights + 8 P moments
                 backward   4 P gradients, and 4 P for their all-reduce    step   8 P
             1   kept       4 P weights + 4 P/W masters + 8 P/W moments
                 backward   4 P + 4 B + 2 P/W                              step   16 P/W
             2   kept       as 1
                 backward   4 B + 4 min(2 B, P) + 4 P/W                    step   16 P/W
             3   kept       4 (P/W + S (1 - 1/W)) weights + 4 P/W masters + 4 P/W gradients + 8 P/W moments + 4 B
                 backward   4 P + 4 G - 4 S (1 - 1/W)                      step   12 P/W
    16 bit   0   kept       2 P weights + 4 P masters + 8 P moments
                 backward   2 P gradients, and 2 P for their all-reduce    step   7 P
             1   kept       2 P weights + 4 P/W masters + 4 P gradients + 8 P/W moments
                 backward   8 P                                            step   2 P + 8 P/W
             2   kept       2 P weights + 4 P/W masters + 8 P/W moments
                 backward   2 B + 2 min(2 B, P) + 4 P/W                    step   12 P/W
             3   kept       2 (P/W + S (1 - 1/W)) weights, 2 B, the rest as in fp32
                 backward   2 P + 2 G - 2 S (1 - 1/W)                      step   12 P/W

Under stage 3 G ≤ P of the weights are gathered at a time: S of them, in small tensors, always are; of the others
stage3_max_live_parameters, and a layer. All this was read off the memory of DeepSpeed 0.19 on two ranks.

Activations, with n tokens in k contexts and T targets on the rank, depth L, width d, latent width d_l, H heads,
elements of e bytes (4 or 2; the token stream always has 4), tiles of t tokens, V genes,

                        without checkpointing                       with it
    streams             4 n d, of gradients                         4 n d (L + 1)
    layers              L n (8 d + 15 e d + 4 H + 24) + 2 n e d     0
                        (dense: 14 e d)
    working             4 t e d, or of the latents                  t (4 d + 16 e d + 4 H) + 2 k M e d, or of the
                        4 k M e d_l                                 latents k M (20 d_l + 10 e d_l - 2 e d)
                                                                    (dense: n (8 d + 15 e d + 4 H + 24))
    or of the head      T (16 d + 4 d t/n + 40)                     4 n d + T (2 e d + 22 d t/n + 40)
    latents             k M (L (8 d_l + 11 e d_l + 4 e d) + 4 d_l)  k M (4 d_l (L - 1) + 4 e d L)
    pack                17 n                                        17 n
    gene vectors        V d e, the gradient of their look-up        V d e

In 16 bit without checkpointing a tile and the head need 2 d more, t and T times; with it the latents that all contexts
begin with 4 M d_l. What the head needs is freed before a layer goes backward: of it and the working memory of a layer,
what is most counts. With memory.offload two streams stay on the device, the head's gradients among them, and L + 1 are
elsewhere.
"""

from dataclasses import dataclass, fields

from cctrain.config import Config, MemoryConfig, ModelConfig
from cctrain.cost.parameters import num_parameters, parameters_of_a_layer
from cctrain.cost.traffic import DEEPSPEEDS_OWN, Gathering, never_partitioned
from cctrain.cost.work import Load, Work

STREAM_BYTES, PACK_BYTES, TARGET_BYTES = 4, 17, 40
LARGEST_BUCKET = 500_000_000  # numbers; DeepSpeed's own default


@dataclass(frozen=True)
class State:
    """Bytes. `backward` and `step` are there only for a while, and not at the same time."""

    weights: float
    masters: float
    moments: float
    gradients: float
    bucket: float
    backward: float
    step: float

    @property
    def kept(self) -> float:
        return self.weights + self.masters + self.moments + self.gradients + self.bucket


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes on the device, but for `offloaded`, of one micro-batch on one rank."""

    streams: float
    layers: float
    working: float
    latents: float
    pack: float
    gene_vectors: float
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self)) - self.offloaded


def reduce_bucket(parameters: int) -> int:
    """DeepSpeed's reduce_bucket_size, in numbers: it allocates that many, whatever the model needs."""
    return min(LARGEST_BUCKET, parameters)


def state(
    model: ModelConfig,
    num_genes: int,
    stage: int,
    element_bytes: int,
    ranks: int,
    bucket: float,
    gathering: Gathering = DEEPSPEEDS_OWN,
) -> State:
    """`bucket` in numbers, DeepSpeed's reduce_bucket_size; `element_bytes` of weights, 2 in half precision."""
    total, b = num_parameters(model, num_genes), element_bytes
    share = total / ranks
    full_precision = b == 4
    if stage == 0:
        reduced = float(b * total) if ranks > 1 else 0.0
        masters = 0.0 if full_precision else 4.0 * total
        return State(
            b * total, masters, 8.0 * total, 0.0, 0.0, b * total + reduced, (8 if full_precision else 7) * total
        )
    masters, moments = 4.0 * share, 8.0 * share
    if stage == 3:
        small = never_partitioned(model, num_genes, gathering.stage3_param_persistence_threshold)
        ahead = gathering.stage3_max_live_parameters if gathering.stage3_prefetch_bucket_size else 0
        whole = small * (1 - 1 / ranks)
        gathered = min(total, small + ahead + parameters_of_a_layer(model))
        weights, backward = b * (share + whole), b * (total + gathered - whole)
        return State(weights, masters, moments, 4 * share, b * bucket, backward, 12 * share)
    if stage == 2:
        backward = b * (bucket + min(2 * bucket, total)) + 4 * share
        return State(float(b * total), masters, moments, 0.0, 0.0, backward, (16 if full_precision else 12) * share)
    if full_precision:
        return State(b * total, masters, moments, 0.0, 0.0, 4 * total + 4 * bucket + 2 * share, 16 * share)
    return State(b * total, masters, moments, 4.0 * total, 0.0, 8.0 * total, 2 * total + 8 * share)


def activations(
    model: ModelConfig, num_genes: int, load: Load, memory: MemoryConfig, tile_tokens: int, element_bytes: int
) -> ActivationMemory:
    """At the start of the backward of one micro-batch; `memory.tile_tokens` is not looked at."""
    n, d, e, depth = load.tokens, model.width, element_bytes, model.depth
    dense = model.attention == "dense"
    tile = min(n, tile_tokens)
    stream = STREAM_BYTES * n * d
    shared = {"pack": PACK_BYTES * n, "gene_vectors": num_genes * d * e}
    latents = load.contexts * model.latents * (0 if dense else 1)
    latent_width = model.latent_width or d
    in_a_layer = 2 * STREAM_BYTES * d + 15 * e * d + 4 * model.heads + 24
    if not memory.checkpointing:
        copied = 2 * d if e == 2 else 0
        head = load.targets * (16 * d + copied + 4 * d * tile / n + TARGET_BYTES)
        return ActivationMemory(
            streams=stream,
            layers=depth * n * (in_a_layer - (e * d if dense else 0)) + n * 2 * e * d,
            working=max(tile * (4 * e * d + copied), latents * 4 * e * latent_width, head),
            latents=latents * (depth * (8 * latent_width + 11 * e * latent_width + 4 * e * d) + 4 * latent_width),
            **shared,
        )
    head = load.targets * (2 * e * d + 22 * d * tile / n + TARGET_BYTES)
    if dense:
        one_stage = n * in_a_layer
    else:
        of_a_tile = tile * (STREAM_BYTES * d + 16 * e * d + 4 * model.heads) + latents * 2 * e * d
        one_stage = max(of_a_tile, latents * (20 * latent_width + 10 * e * latent_width - 2 * e * d))
    begun_with = 4 * model.latents * latent_width if e == 2 and not dense else 0
    checkpoints, offloaded = (depth + 1) * stream, memory.offload != "device"
    return ActivationMemory(
        streams=2 * stream if offloaded else checkpoints,
        layers=0.0,
        working=max(one_stage, head if offloaded else stream + head),
        latents=latents * (4 * latent_width * (depth - 1) + 4 * e * d * depth) + begun_with,
        offloaded=checkpoints if offloaded else 0.0,
        **shared,
    )


def peak(state: State, activations: ActivationMemory, micro_batches: int) -> float:
    """Bytes. In the first backward of a step gradients take the place of the activations that they are made from;
    in the later ones they are there from the start."""
    together = activations.total + state.backward if micro_batches > 1 else max(activations.total, state.backward)
    return state.kept + max(together, state.step)


def rank_memory(config: Config, num_genes: int, work: Work) -> tuple[State, ActivationMemory]:
    model, zero_options = config.model, config.deepspeed.get("zero_optimization", {})
    bucket = zero_options.get("reduce_bucket_size", reduce_bucket(num_parameters(model, num_genes)))
    held = state(model, num_genes, work.zero_stage, work.element_bytes, work.ranks, bucket, work.gathering)
    return held, activations(model, num_genes, work.most, work.memory, work.tile_tokens, work.element_bytes)
