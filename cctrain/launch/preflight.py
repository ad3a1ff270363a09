"""Look at every node of a job before it trains: `python -m cctrain.launch.preflight RUN`, on every rank.

Each rank looks at what is its own: devices, versions, code, the run directory. The first rank collects what they
found through a TCP store, which needs neither GPUs nor a common file system, and says which node is bad. Then a small
all-reduce, first inside each node and then over all. Exit code 0, or 5 with the bad nodes named.

A rank that does not answer is named by the one that waits for it, after WAIT_SECONDS.
"""

import argparse
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from cctrain.errors import CctrainError, TrainingError

# Between the first rank's start and the last one's: a cold file system may need minutes to hand out torch.
WAIT_SECONDS = 300.0
FREE_GIB = 1.0
SAME_EVERYWHERE = ("cctrain", "python", "torch", "deepspeed", "code")

Facts = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cctrain.launch.preflight", description=__doc__)
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each node must have")
    parser.add_argument("--code", help="digest of the source that was submitted")
    arguments = parser.parse_args()
    from cctrain.launch.step import adopt_step

    try:
        adopt_step()
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
            os.environ.setdefault(name, value)
        check(arguments.run, arguments.gpus, arguments.code)
    except CctrainError as error:
        print(f"preflight: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def check(run_dir: Path, gpus: int, submitted_code: str | None) -> None:
    """Raises TrainingError: on the first rank with all bad nodes, elsewhere only where the first cannot be reached.
    The others leave with its exit code."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank, local_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    facts = own_facts(run_dir, gpus)
    store = open_store(rank, num_ranks)
    with marked(run_dir, store, rank, facts["problems"]):
        facts["problems"] += check_mark(run_dir, read(store, "token"))
        ranks = agree(store, "facts", facts, rank, num_ranks, submitted_code)
    if rank == 0:
        for line in (*notes(ranks, submitted_code), summary(ranks)):
            print(f"preflight: {line}", flush=True)
    node = facts["node"]
    agree(store, "inside", all_reduce(store, node, f"node {node}", local_rank, local_ranks), rank, num_ranks)
    if num_ranks > local_ranks:
        agree(store, "between", all_reduce(store, node, "all nodes", rank, num_ranks), rank, num_ranks)
    if rank == 0:
        print(f"preflight: an all-reduce over {num_ranks} ranks was right", flush=True)


def own_facts(run_dir: Path, gpus: int) -> Facts:
    """What this rank sees, with what is wrong with it."""
    problems: list[str] = []

    def look(what: str, find: Callable[[], Any]) -> Any:
        try:
            return find()
        except CctrainError as error:
            problems.append(str(error))
        except Exception as error:  # whatever a broken installation raises: it is this node's trouble
            problems.append(f"{what}: {error or type(error).__name__}")
        return None

    facts = {
        "node": node_name(),
        "python": platform.python_version(),
        "torch": look("torch cannot be imported", lambda: __import__("torch").__version__),
        "deepspeed": look("deepspeed is not installed", deepspeed_version),
        "cctrain": __import__("cctrain").__version__,
        "code": look("cctrain's source cannot be read", code),
        "commit": look("commit", commit),
        "problems": problems,
    }
    look("devices", lambda: check_devices(gpus, problems))
    look("disk space", lambda: check_space(run_dir, problems))
    return facts


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def deepspeed_version() -> str:
    from importlib.metadata import version

    return version("deepspeed")


def code() -> str:
    from cctrain.code_version import code_digest

    return code_digest()


def commit() -> str | None:
    from cctrain.code_version import code_commit

    return code_commit()


def check_devices(gpus: int, problems: list[str]) -> None:
    """As many GPUs as the job asked for, and this rank's own can add."""
    import torch

    from cctrain.parallel.mesh import find_device_kind

    kind = find_device_kind()
    if not gpus:
        return
    seen = torch.cuda.device_count() if kind == "cuda" else 0
    if seen != gpus:
        problems.append(f"torch sees {seen} GPUs where the job asked for {gpus} (nvidia-smi there says more)")
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if float(torch.ones(1024, device=device).sum()) != 1024:
        problems.append(f"{device} ({torch.cuda.get_device_name(device)}) cannot add: take the node out of service")


def check_space(run_dir: Path, problems: list[str]) -> None:
    """Room for the next checkpoint: twice the newest one, 1 GiB at least."""
    sizes = [
        sum(file.stat().st_size for file in folder.iterdir())
        for folder in run_dir.glob("checkpoints/step-" + "[0-9]" * 8)
    ]
    needed = max(FREE_GIB, 2 * max(sizes, default=0) / 2**30)
    free = shutil.disk_usage(run_dir).free / 2**30
    if free < needed:
        problems.append(f"{run_dir} has {free:.1f} GiB free, a checkpoint needs {needed:.1f} GiB")


def open_store(rank: int, num_ranks: int) -> Any:
    """The first rank serves it, one port above the training's own."""
    try:
        import torch.distributed as dist
    except ImportError as error:
        raise TrainingError(f"node {node_name()} cannot import torch: {error}") from error
    # Longer than the first rank waits for the last one, so that its word comes first.
    patience = timedelta(seconds=WAIT_SECONDS + 60)
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "10000")) + 1
    try:
        return dist.TCPStore(address, port, num_ranks, rank == 0, patience, wait_for_workers=False)
    except (RuntimeError, OSError) as error:
        who = "cannot listen on" if rank == 0 else "cannot reach the first rank at"
        raise TrainingError(f"node {node_name()} {who} {address}, port {port}: {str(error).splitlines()[0]}") from error


def read(store: Any, key: str) -> str:
    try:
        return store.get(key).decode()
    except (RuntimeError, OSError) as error:
        raise TrainingError(f"node {node_name()} had no answer from the first rank") from error


@contextmanager
def marked(run_dir: Path, store: Any, rank: int, problems: list[str]) -> Iterator[None]:
    """While it lasts, the first rank has a file in the run directory that the others look for."""
    if rank:
        yield
        return
    token = secrets.token_hex(8)
    mark = run_dir / "slurm" / f"preflight-{token}"
    try:
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(token)
    except OSError as error:
        problems.append(f"cannot write {mark.parent} ({error.strerror})")
    store.set("token", token)
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def check_mark(run_dir: Path, token: str) -> list[str]:
    """The first rank has left a file: is it here, and can one be written beside it?"""
    folder = run_dir / "slurm"
    try:
        if (folder / f"preflight-{token}").read_text() != token:
            return [f"{folder} holds something else than on the first node"]
        own = folder / f"preflight-{token}-{os.environ['RANK']}"
        own.write_text(token)
        own.unlink()
    except FileNotFoundError:
        return [f"{folder} is not the folder that the first node sees: is {run_dir} on a file system of all nodes?"]
    except OSError as error:
        return [f"cannot write {folder} ({error.strerror})"]
    return []


def agree(
    store: Any, name: str, mine: Facts, rank: int, num_ranks: int, submitted_code: str | None = None
) -> list[Facts]:
    """Show the first rank what this one found; all leave if it finds a bad node. Returns what all found, on the first
    rank; [] on the others."""
    store.set(f"{name}/{rank}", json.dumps(mine))
    ranks = []
    if rank == 0:
        ranks = collect(store, name, num_ranks)
        store.set(f"{name}/bad", json.dumps(bad_nodes(ranks, submitted_code)))
    bad = json.loads(read(store, f"{name}/bad"))
    store.set(f"{name}/heard/{rank}", "")
    if rank == 0:
        # It serves the store: were it to leave now, the others would speak of a lost connection.
        with suppress(RuntimeError):
            store.wait([f"{name}/heard/{other}" for other in range(num_ranks)], timedelta(seconds=10))
    if not bad:
        return ranks
    if rank == 0:
        raise TrainingError(told(bad, len({facts["node"] for facts in ranks})))
    raise SystemExit(TrainingError.exit_code)


def collect(store: Any, name: str, num_ranks: int) -> list[Facts]:
    """What all ranks have said; for one that is silent, that."""
    deadline = time.monotonic() + WAIT_SECONDS
    found = []
    for rank in range(num_ranks):
        left = max(1.0, deadline - time.monotonic())
        try:
            store.wait([f"{name}/{rank}"], timedelta(seconds=left))
            found.append(json.loads(store.get(f"{name}/{rank}")))
        except (RuntimeError, OSError):
            silent = f"rank {rank} said nothing within {WAIT_SECONDS:.0f} s: srun may have said why"
            found.append({"node": node_of(rank), "problems": [silent]})
    return found


def node_of(rank: int) -> str:
    """The node of a rank that says nothing: Slurm hands out ranks in the order of nodes."""
    from cctrain.launch.step import nodes_of_step

    nodes = nodes_of_step()
    return nodes[rank] if rank < len(nodes) else f"of rank {rank}"


def bad_nodes(ranks: list[Facts], submitted_code: str | None) -> dict[str, list[str]]:
    """What is wrong with each node, said once."""
    bad: dict[str, list[str]] = {}
    for facts in ranks:
        for problem in facts["problems"]:
            bad.setdefault(facts["node"], []).append(problem)
    for key in SAME_EVERYWHERE:
        for node, problem in odd_ones(key, [facts for facts in ranks if facts.get(key)], submitted_code):
            bad.setdefault(node, []).append(problem)
    return {node: list(dict.fromkeys(problems)) for node, problems in bad.items()}


def notes(ranks: list[Facts], submitted_code: str | None) -> list[str]:
    """What the user should know, and training can bear."""
    found = ranks[0]
    if not submitted_code or found["code"] == submitted_code:
        return []
    return [
        "this job finds other code than was submitted: cctrain's source has changed, and is now at "
        f"{found['commit'] or 'an unknown commit'}. What was submitted is in RUN/submission.json and submitted.diff"
    ]


def odd_ones(key: str, ranks: list[Facts], submitted_code: str | None) -> list[tuple[str, str]]:
    """The nodes that differ from most; for code, from what was submitted, if any node has that."""
    values = Counter(facts[key] for facts in ranks)
    if len(values) < 2:
        return []
    most = max(values.values())
    usual = next(facts[key] for facts in ranks if values[facts[key]] == most)
    if key == "code" and submitted_code in values:
        usual = submitted_code
    if key == "code":
        whose = "was submitted" if usual == submitted_code else "the other nodes have"
        return [
            (facts["node"], f"has other code of cctrain than {whose} ({facts.get('commit') or facts[key][:12]})")
            for facts in ranks
            if facts[key] != usual
        ]
    return [
        (facts["node"], f"has {key} {facts[key]} where others have {usual}") for facts in ranks if facts[key] != usual
    ]


def summary(ranks: list[Facts]) -> str:
    first = ranks[0]
    nodes = list(dict.fromkeys(facts["node"] for facts in ranks))
    return (
        f"{len(ranks)} ranks on {', '.join(nodes)}; cctrain {first.get('cctrain')} "
        f"({first.get('commit') or 'no checkout'}), torch {first.get('torch')}"
    )


def all_reduce(store: Any, node: str, where: str, member: int, members: int) -> Facts:
    """Every rank adds its number. What fails inside a node is the node's fault."""
    import torch
    import torch.distributed as dist

    from cctrain.parallel.mesh import find_device_kind

    problem = None
    try:
        kind = find_device_kind()
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=dist.PrefixStore(f"all-reduce {where}", store),
            rank=member,
            world_size=members,
            timeout=timedelta(seconds=WAIT_SECONDS),
        )
        numbers = torch.full((1024,), float(member + 1), device=device)
        dist.all_reduce(numbers)
        if float(numbers.sum()) != 1024 * members * (members + 1) / 2:
            problem = "the sum is wrong"
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # a collective fails in many ways, all of them worth telling
        problem = f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}"
    return {"node": node, "problems": [f"the all-reduce over {where} failed: {problem}"] if problem else []}


def told(bad: dict[str, list[str]], num_nodes: int) -> str:
    lines = [f"  {node}: {problem}" for node, problems in bad.items() for problem in problems]
    names = ", ".join(bad)
    text = f"nothing is trained, because of {'node' if len(bad) == 1 else 'the nodes'} {names}:\n" + "\n".join(lines)
    if len(bad) < num_nodes:
        text += f"\nMend that, or go round it: #SBATCH --exclude={names.replace(' ', '')}"
    return text


if __name__ == "__main__":
    main()
