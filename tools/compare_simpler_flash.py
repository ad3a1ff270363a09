"""Where the published criss-cross attention and ours differ, shown by running both.

    pip install --no-deps simpler-flash==1.3.5 einops
    python -m tools.compare_simpler_flash [--out PAGE.md]

`simpler-flash` 1.3.5 (https://github.com/jkobject/simpler_flash, MIT) is the criss-cross attention of scPRINT-2. It
is optional: this script alone needs it, and einops. It imports torchvision for stochastic depth, which is off
here: where torchvision is missing, an identity takes its place. Runs on the CPU in seconds.
"""

import argparse
import contextlib
import importlib
import io
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cctrain.code_version import code_commit
from cctrain.model.activations import Activations
from cctrain.model.layer import CrissCrossLayer
from cctrain.model.tiles import cut_into_tiles

VERSION = "1.3.5"
INSTALL = f"pip install --no-deps simpler-flash=={VERSION} einops"
WIDTH, HEADS, NUM_LATENTS, LATENT_WIDTH = 64, 4, 16, 32
NUM_TOKENS = 50
DROPOUT = 0.1


@dataclass
class Finding:
    title: str
    question: str
    theirs: str
    ours: str
    differs: bool
    why: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the page, in Markdown; default: standard output")
    arguments = parser.parse_args()
    try:
        package = load_simpler_flash()
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. This script runs simpler-flash beside cctrain: {INSTALL}") from None
    if package.__version__ != VERSION:
        print(f"What is said of simpler-flash was read in {VERSION}; here is {package.__version__}.", file=sys.stderr)
    torch.manual_seed(0)
    text = page(
        [padding(package), mixing(package), dropout(package), gradients(package)],
        f"simpler-flash {package.__version__}, torch {torch.__version__}, cctrain {code_commit() or 'without git'}",
    )
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text)


def load_simpler_flash() -> Any:
    """The package, whatever torchvision is here. Raises `ModuleNotFoundError` if it, or einops, is missing."""
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        stand_in: Any = types.ModuleType("torchvision.ops")
        stand_in.StochasticDepth = NoStochasticDepth
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update({"torchvision": types.ModuleType("torchvision"), "torchvision.ops": stand_in})
    # On import it prints which optional kernels it misses.
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module("simpler_flash")


class NoStochasticDepth(nn.Module):
    def __init__(self, p: float, mode: str):
        super().__init__()
        if p != 0:
            raise ValueError(f"without torchvision stochastic depth is off, not {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return x


def their_stack(package: Any, depth: int, attention_dropout: float = 0.0, **options: Any) -> nn.Module:
    """FlashTransformer with criss-cross attention; takes (batch, n, WIDTH)."""
    settings = {
        "d_model": WIDTH,
        "nhead": HEADS,
        "nlayers": depth,
        "dropout": 0.0,
        "attn_dropout": attention_dropout,
        "attn_type": "criss-cross",
        "sketcher_size": NUM_LATENTS,
        "sketcher_dim": LATENT_WIDTH,
    }
    return package.FlashTransformer(**(settings | options)).eval()


class OurStack(nn.Module):
    """Criss-cross layers and their latents; takes (total, WIDTH) and offsets."""

    def __init__(self, depth: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(NUM_LATENTS, LATENT_WIDTH))
        self.layers = nn.ModuleList(CrissCrossLayer(WIDTH, LATENT_WIDTH, HEADS) for _ in range(depth))

    def forward(self, tokens: Tensor, offsets: list[int]) -> Tensor:
        latents = self.latents.expand(len(offsets) - 1, -1, -1)
        tiles, whole = [tokens], cut_into_tiles(offsets, num_tiles=1)
        for layer in self.layers:
            tiles, latents = layer(tiles, latents, whole, Activations())
        return tiles[0]


@torch.no_grad()
def padding(package: Any) -> Finding:
    """Two layers. The last 20 of 50 tokens are padding; what they hold changes."""
    real = 30
    tokens = torch.randn(NUM_TOKENS, WIDTH)
    other = torch.cat([tokens[:real], torch.randn(NUM_TOKENS - real, WIDTH)])
    theirs = their_stack(package, depth=2)
    keep = (torch.arange(NUM_TOKENS) < real).unsqueeze(0)
    masked = theirs(tokens.unsqueeze(0), mask_zeros=keep)
    effect = largest(masked - theirs(tokens.unsqueeze(0)))
    leak = largest((theirs(other.unsqueeze(0), mask_zeros=keep) - masked)[0, :real])
    ours = OurStack(depth=2)
    offsets = [0, real, NUM_TOKENS]
    our_leak = largest((ours(other, offsets) - ours(tokens, offsets))[:real])
    return Finding(
        "Padding",
        "By how much do real tokens change when only what lies in the padding changes?",
        f"{leak:.3g}, with the padding masked. The mask changes the output by {effect:.3g}.",
        f"{our_leak:.3g}. There is no padding: contexts are packed, and here the other tokens are another context's.",
        effect == 0 and leak > 0 and our_leak == 0,
        "`key_padding_mask` is accepted and not used in the criss-cross branch of `MHA.forward`.",
    )


@torch.no_grad()
def mixing(package: Any) -> Finding:
    """One layer. Every token but the first changes."""
    tokens = torch.randn(NUM_TOKENS, WIDTH)
    other = torch.cat([tokens[:1], torch.randn(NUM_TOKENS - 1, WIDTH)])
    theirs, ours, offsets = their_stack(package, depth=1), OurStack(depth=1), [0, NUM_TOKENS]
    their_change = largest((theirs(other.unsqueeze(0)) - theirs(tokens.unsqueeze(0)))[0, 0])
    our_change = largest((ours(other, offsets) - ours(tokens, offsets))[0])
    return Finding(
        "What one layer mixes",
        "By how much does token 0 change after one layer when all other tokens change?",
        f"{their_change:.3g}",
        f"{our_change:.3g}",
        their_change == 0 and our_change > 0,
        "Tokens and latents are both updated from the old state, so tokens hear of each other one layer later. "
        "Ours writes from the latents that have just read.",
    )


@torch.no_grad()
def dropout(package: Any) -> Finding:
    """Two runs of the same input, in evaluation mode."""
    tokens = torch.randn(NUM_TOKENS, WIDTH)
    theirs, ours, offsets = (
        their_stack(package, 2, attention_dropout=DROPOUT),
        OurStack(depth=2).eval(),
        [0, NUM_TOKENS],
    )
    their_noise = largest(theirs(tokens.unsqueeze(0)) - theirs(tokens.unsqueeze(0)))
    our_noise = largest(ours(tokens, offsets) - ours(tokens, offsets))
    return Finding(
        "Evaluation",
        f"By how much do two runs of one input differ in evaluation mode (attention dropout {DROPOUT})?",
        f"{their_noise:.3g}",
        f"{our_noise:.3g}. There is no dropout.",
        their_noise > 0 and our_noise == 0,
        "`CrossAttention.forward` passes `dropout_p=self.dropout` whether it trains or not. "
        "The default of `attn_dropout` is 0, where this has no effect.",
    )


def gradients(package: Any) -> Finding:
    """Two layers; the loss is of the tokens, which is what a model predicts from."""
    tokens = torch.randn(NUM_TOKENS, WIDTH)
    theirs, ours = their_stack(package, depth=2), OurStack(depth=2)
    theirs(tokens.unsqueeze(0)).square().sum().backward()
    ours(tokens, [0, NUM_TOKENS]).square().sum().backward()
    without, our_without = without_gradient(theirs), without_gradient(ours)
    return Finding(
        "Parameters without a gradient",
        "Which parameters does a loss of the tokens not reach?",
        ", ".join(f"`{name}`" for name in without) or "none",
        ", ".join(f"`{name}`" for name in our_without) or "none",
        bool(without) and not our_without,
        "In the last layer nothing uses the updated latents. In ours the write does.",
    )


def without_gradient(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or torch.count_nonzero(parameter.grad) == 0
    ]


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def page(findings: list[Finding], versions: str) -> str:
    lines = [
        "# The published criss-cross attention and ours",
        "",
        f"Written by `tools/compare_simpler_flash.py`, which runs both: {versions}. Width {WIDTH}, {HEADS} heads, "
        f"{NUM_LATENTS} latents of width {LATENT_WIDTH}, {NUM_TOKENS} tokens, random weights, fp32 on the CPU. "
        "Numbers are largest absolute differences; 0 is exactly 0.",
        "",
        "| | simpler-flash | cctrain |",
        "|---|---|---|",
        *(f"| {finding.question} | {finding.theirs} | {finding.ours} |" for finding in findings),
    ]
    for finding in findings:
        verdict = "" if finding.differs else " **This run does not show it.**"
        lines += ["", f"**{finding.title}.** {finding.why}{verdict}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
