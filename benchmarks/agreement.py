"""The load generator beside `vllm bench serve`: `python -m benchmarks.agreement --help`.

Both load the same server with the same prompts in a closed loop, one after the other, in several rounds. What
they say is to differ by less than 5%.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import uvloop

from benchmarks.load import Plan, run
from benchmarks.peers.catalog import cache_folder, peers
from benchmarks.peers.launch import ROOT, environment, tail
from benchmarks.peers.measure import PROMPT
from benchmarks.peers.peer import MODEL, PeerFailed, Running
from benchmarks.peers.settings import SIMULATED, Engine
from benchmarks.result import RESULTS, Commit, Machine, Record
from benchmarks.rows import Row, table
from benchmarks.workload import Workload
from serving.source import SourceError

PEER = "vllm-python"

WITHIN = 0.05


@dataclass(frozen=True, slots=True)
class Load:
    """What both put on the server, and what is compared of it."""

    step_ms: float
    streams: int
    requests: int
    max_tokens: int
    figures: Sequence[str]
    """Under the same names in both."""

    @property
    def engine(self) -> Engine:
        """What the server runs."""
        return replace(SIMULATED, step_ms=self.step_ms)

    @property
    def workload(self) -> Workload:
        """What each request asks."""
        return Workload(MODEL, PROMPT, self.max_tokens, ignore_eos=True)


THROUGHPUT = ("request_throughput", "output_throughput")
PACE = ("mean_tpot_ms", "mean_itl_ms", "median_e2el_ms")

SLOW = Load(50, 16, 160, 32, (*THROUGHPUT, "median_ttft_ms", *PACE, "p99_e2el_ms"))
"""Steps ten times slower than where servers are compared: `vllm bench serve` takes 3 ms and more to send 16
requests at once, which would be a tenth of the time to the first token there."""

FAST = Load(5, 64, 640, 128, (*THROUGHPUT, *PACE))
"""As where servers are compared, without the time to the first token: a large part of it is the client's own
sending of 64 requests at once, and so it cannot agree."""

BENCH_S = 300.0
"""Seconds that one run of `vllm bench serve` may take, most of them its start."""

Figures = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Agreement(Record):
    """What both said, round by round."""

    figures: Sequence[str]
    ours: Sequence[Figures]
    theirs: Sequence[Figures]

    @property
    def rows(self) -> list[Row]:
        """Of each figure the medians over the rounds, and the median of the ratios within them."""
        rows = []
        for name in self.figures:
            mine, other = [each[name] for each in self.ours], [each[name] for each in self.theirs]
            rows.append(Row(f"{name}, vllm bench serve", median(other), ""))
            rows.append(Row(f"{name}, this generator", median(mine), ""))
            ratio = median(one / two for one, two in zip(mine, other, strict=True))
            agrees = abs(ratio - 1) < WITHIN
            rows.append(Row("  ratio", ratio, "x", f"within {WITHIN:.0%} of 1", agrees))
        return rows

    def shown(self) -> Mapping[str, object]:
        return {"ours": self.ours, "theirs": self.theirs, "ratios": [asdict(row) for row in self.rows]}

    def table(self) -> str:
        return table(self.rows)


def ours(server: Running, load: Load) -> Figures:
    """What this generator says. Raises PeerFailed where an answer failed."""
    plan = Plan(
        server.target,
        load.workload,
        load.streams,
        requests=load.requests,
        warm_up=load.streams,
        expect_tokens=True,
    )
    result = uvloop.run(run(plan))
    if result.failures:
        raise PeerFailed(f"answers failed: {result.failures}")
    return {name: value for name in load.figures if (value := result.figures[name]) is not None}


def theirs(server: Running, load: Load, folder: Path) -> Figures:
    """What `vllm bench serve` says. Raises PeerFailed."""
    # In the form of a data set that it reads without a further library; the second value is not sent.
    prompts = folder / "prompts.json"
    spoken = [[f"{number:08d} {PROMPT}", PROMPT] for number in range(load.requests)]
    prompts.write_text(json.dumps([{"conversations": [{"value": said} for said in each]} for each in spoken]))
    options = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "base-url": f"http://{server.target.authority}",
        "model": MODEL,
        "tokenizer": load.engine.folder(),
        "dataset-name": "sharegpt",
        "dataset-path": prompts,
        "sharegpt-output-len": load.max_tokens,
        "num-prompts": load.requests,
        "num-warmups": load.streams,
        "max-concurrency": load.streams,
        "temperature": 0,
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "99",
        "result-dir": folder,
        "result-filename": "theirs.json",
    }
    command = [sys.executable, "-m", "benchmarks.peers.command", "bench", "serve"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command += ["--ignore-eos", "--save-result", "--disable-tqdm"]
    log = folder / "bench.log"
    try:
        with log.open("wb") as output:
            subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(),
                timeout=BENCH_S,
                check=True,
            )
    except subprocess.SubprocessError as error:
        raise PeerFailed(f"{error}:\n{tail(log)}") from error
    told = json.loads((folder / "theirs.json").read_text())
    return {name: told[name] for name in load.figures}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: they agree. 1: they do not. 2: it could not run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    load = chosen(options)
    agreement = Agreement(
        name="agreement",
        started=datetime.now(UTC),
        command=shlex.join(["python", "-m", "benchmarks.agreement", *arguments]),
        commit=Commit.here(),
        machine=Machine.here(),
        workload={
            **asdict(load.workload),
            "server": options.peer,
            "step_ms": load.step_ms,
            "streams": load.streams,
            "requests": load.requests,
        },
        figures=load.figures,
        ours=[],
        theirs=[],
    )
    peer = peers(load.engine)[options.peer]
    try:
        peer.prepare(cache_folder())
        with TemporaryDirectory(prefix="bench-") as folder, peer.running(Path(folder)) as server:
            for _ in range(options.rounds):
                their = theirs(server, load, Path(folder))
                mine = ours(server, load)
                agreement = replace(
                    agreement, ours=[*agreement.ours, mine], theirs=[*agreement.theirs, their]
                )
    except (PeerFailed, SourceError, OSError) as error:
        print(f"benchmarks.agreement: {error}", file=sys.stderr)
        return 2
    print(f"{agreement.table()}\n\nwritten to {agreement.write(options.results)}")
    return 0 if all(row.met is not False for row in agreement.rows) else 1


def chosen(options: argparse.Namespace) -> Load:
    """The load that the options name."""
    load = FAST if options.fast else SLOW
    streams, requests = options.streams or load.streams, options.requests or load.requests
    return replace(load, streams=streams, requests=requests)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agreement",
        description="Loads one server with this generator and with `vllm bench serve` in turns, and prints "
        "what both say. Exit status: 0 if they agree within 5%, 1 if not, 2 if it could not run.",
    )
    add = parser.add_argument
    add("--peer", choices=peers(), default=PEER, metavar="NAME", help="the server to load (%(default)s)")
    fast = f"steps of {FAST.step_ms:g} ms, as where servers are compared, not of {SLOW.step_ms:g}; no TTFT"
    add("--fast", action="store_true", help=fast)
    at_once = f"requests in flight at once ({SLOW.streams}; {FAST.streams} with --fast)"
    add("--streams", type=int, metavar="N", help=at_once)
    add("--requests", type=int, metavar="N", help=f"in each run ({SLOW.requests}; {FAST.requests})")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each (%(default)s)")
    where = "folder of the result (benchmarks/results)"
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=where)
    return parser


if __name__ == "__main__":
    sys.exit(main())
