"""Tests and measures a GPU in a few minutes: python -m benchmarks.gpu_check --minutes 9 --out DIR

Runs the tests that need a GPU, then measures training, attention, the mixture of experts, decoding and a
whole training run, the most valuable first. Needs no network. Updates DIR/gpu.json after each figure, and
summary.md and the pictures after each section, so an interrupted check keeps its results. gpu_sections.py and
its imports measure; gpu_report.py writes the summary.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from lab import cli, stages  # before torch, because lab reports missing packages
from lab.errors import UserError, shown
from lab.storage import runs

# isort: split
import torch

from benchmarks import gpu_report, gpu_run, gpu_sections

FORMAT = 1  # of gpu.json
POLL_SECONDS = 0.2
LAST_SECONDS = 5  # reserved for the last pictures and the summary


@dataclass(frozen=True)
class Section:
    name: str  # the function in gpu_sections.py
    number: int  # for --only
    seconds: int  # time limit, if the whole check takes nine minutes


# In the order of execution: what needs no compiling comes before the compiled speeds. The training run comes
# last, because it records its progress and so needs not finish.
SECTIONS = [
    Section("machine", 0, 40),
    Section("tests", 1, 140),
    Section("eager", 2, 45),
    Section("float32", 2, 40),
    Section("attention", 3, 50),
    Section("mixture", 4, 40),
    Section("compiled", 2, 130),
    Section("decoding", 5, 80),
    Section("serving", 8, 90),
    Section("nanogpt", 7, 50),
    Section("training", 6, 160),
]


@dataclass
class Settings:
    """Tests and measures a GPU, and writes the results to a folder."""

    minutes: float = 9.0
    """Time limit for the whole check. Sections not reached by then are listed."""
    out: str | None = None
    """Folder for gpu.json, summary.md and the pictures. None: a new folder, runs/gpu-check."""
    only: str | None = None
    """Sections to run, such as 1,3. 1: tests, 2: training speed, 3: attention, 4: mixture of experts,
    5: decoding, 6: a whole training run, 7: nanoGPT, 8: serving. None: all."""
    nanogpt: str | None = None
    """Folder of a checkout of karpathy/nanoGPT, to measure its model too."""
    smoke: bool = False
    """Test this program: run everything with tiny sizes on the CPU, without compiling."""

    def __post_init__(self):
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"minutes must be above 0, not {self.minutes}")


def main():
    settings = cli.parse_flags(Settings, sys.argv[1:])
    chosen = chosen_sections(settings.only)
    if settings.nanogpt and not (Path(settings.nanogpt) / "model.py").exists():
        raise UserError(f"{settings.nanogpt} is not a checkout of nanoGPT: it has no model.py")
    if not settings.smoke and not torch.cuda.is_available():
        raise UserError(
            "this program measures a CUDA device, but this machine has none\n"
            "use --smoke to run everything with tiny sizes on the CPU"
        )
    out = new_folder(settings.out)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as scratch:
        check = Check(settings, chosen, out, Path(scratch))
        try:
            check.run()
        finally:
            check.stop_all()
            check.finish()
    print(f"\n{(out / 'summary.md').read_text()}")
    print(f"results are in {shown(out)}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def chosen_sections(only: str | None) -> list[Section]:
    """The sections in --only, and always "machine". Raises UserError for an unknown number."""
    numbers = {section.number for section in SECTIONS}
    if only is None:
        return SECTIONS
    try:
        wanted = {int(part) for part in only.split(",")}
    except ValueError:
        wanted = set()
    if not wanted or not wanted <= numbers:
        raise UserError(
            f"--only {only}: use numbers from 1 to {max(numbers)} separated by commas, such as 1,3"
        )
    return [section for section in SECTIONS if section.number in wanted | {0}]


def new_folder(out: str | None) -> Path:
    """Creates the output folder. Raises UserError if it contains an earlier check."""
    folder, number = Path(out) if out else runs.RUNS / "gpu-check", 1
    while (folder / "gpu.json").exists():
        if out:
            raise UserError(f"{out} has the gpu.json of an earlier check: choose another folder with --out")
        number += 1
        folder = runs.RUNS / f"gpu-check-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass
class Job:
    """A process of gpu_sections.py, and its progress."""

    section: str
    name: str  # of its files
    shard: object = None
    done: set[str] = field(default_factory=set)  # parts to skip if the process is restarted
    started: list[str] = field(default_factory=list)  # the current part, and the part within it
    process: subprocess.Popen | None = None
    read: int = 0  # bytes read from its file of figures

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None


class Check:
    """Runs the sections one after another, and keeps gpu.json up to date."""

    def __init__(self, settings: Settings, sections: list[Section], out: Path, scratch: Path):
        self.settings, self.sections, self.out, self.scratch = settings, sections, out, scratch
        self.began = time.monotonic()
        self.end = self.began + 60 * settings.minutes - min(LAST_SECONDS, 6 * settings.minutes)
        self.jobs: list[Job] = []  # running jobs
        self.report = {
            "format": FORMAT,
            "smoke": settings.smoke,
            "minutes": settings.minutes,
            "command": sys.argv,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "finished": False,
            "machine": {},
            "sections": {
                section.name: {
                    "number": section.number,
                    "status": "not reached",
                    "figures": {},
                    "skipped": {},
                }
                for section in sections
            },
            "failed": [],
        }
        self.write()

    def run(self) -> None:
        for section in self.sections:
            state = self.report["sections"][section.name]
            if section.name == "nanogpt" and not self.settings.nanogpt:
                state |= {"status": "skipped", "why": "no --nanogpt DIR was given"}
                continue
            seconds = min(section.seconds * max(1.0, self.settings.minutes / 9), self.end - time.monotonic())
            if seconds < min(10, self.settings.minutes):
                continue
            self.run_section(section, seconds)
            self.draw()
            print(gpu_report.line(section.name, state, time.monotonic() - self.began), flush=True)

    def run_section(self, section: Section, seconds: float) -> None:
        """Runs a section, for at most `seconds`, and records its status in the report."""
        state, began = self.report["sections"][section.name], time.monotonic()
        until = began + seconds
        state["status"] = "running"
        jobs, at_once = [Job(section.name, section.name)], 1
        if section.name == "tests":  # tests and compiling are not timed, so they may share the machine
            at_once = self.processes_at_once()
            n_shards = max(1, at_once // 2)
            jobs = [Job("tests", f"tests{number}", [number, n_shards]) for number in range(n_shards)]
            jobs += [Job("warm_up", f"warm_up{n}", parts) for n, parts in enumerate(self.warm_ups())]
        while (jobs or self.jobs) and time.monotonic() < until:
            while jobs and len(self.jobs) < at_once:
                self.start(jobs.pop(0), until)
            time.sleep(POLL_SECONDS)
            changed = False
            for job in list(self.jobs):
                ended = job.ended()
                changed |= self.read(job, state)
                if ended:
                    self.jobs.remove(job)
                    jobs[:0] = self.after(job)
                    changed = True
            if changed:
                self.write()
        unfinished = [job for job in self.jobs + jobs if job.section == section.name]
        self.stop_all()
        state["seconds"] = round(time.monotonic() - began, 1)
        failures = any(failure["section"] == section.name for failure in self.report["failed"])
        skipped = not state["figures"] and state["skipped"]
        state["status"] = "failed" if failures else "skipped" if skipped else "ok"
        if state["status"] == "skipped":
            state["why"] = "; ".join(sorted(set(state["skipped"].values())))
        if unfinished:
            state["status"] = "failed" if failures else "cut off"
            at = [job.started[-1] for job in unfinished if job.started]
            state["why"] = f"timed out after {seconds:.0f} seconds" + (f", in: {', '.join(at)}" if at else "")
        self.write()

    def processes_at_once(self) -> int:
        """How many processes may use the device and compile at once, given the cores and the memory."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = self.report["machine"].get("memory_bytes", 0)
        return max(1, min(cores * 3 // 4, int(memory // (6 * 2**30))))

    def warm_ups(self) -> list[list[str]]:
        """What to compile while the tests run, by process: only what later sections need."""
        needs = {"training": {"compiled", "training"}, "attention": {"attention"}, "decoding": {"decoding"}}
        names = {section.name for section in self.sections}
        processes = gpu_sections.warm_ups(self.settings.smoke)
        return [parts for parts in processes if names & needs[parts[0].split(":")[0]]]

    def start(self, job: Job, until: float) -> None:
        """Starts a job in its own process group, so that its children can be killed with it."""
        figures, output = (self.scratch / f"{job.name}.{kind}" for kind in ("jsonl", "log"))
        command = [sys.executable, "-m", "benchmarks.gpu_sections", job.section]
        command += [str(figures), str(self.scratch), f"--seconds={until - time.monotonic():.1f}"]
        command += [f"--done={json.dumps(sorted(job.done))}", f"--shard={json.dumps(job.shard)}"]
        if self.settings.nanogpt:
            command.append(f"--nanogpt={self.settings.nanogpt}")
        environment = dict(os.environ)
        if self.settings.smoke:
            command.append("--smoke")
            environment |= {"TORCHDYNAMO_DISABLE": "1", "TRITON_INTERPRET": "1"}
        if job.section in ("tests", "warm_up"):
            environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
        with open(output, "a") as file:
            job.process = subprocess.Popen(
                command,
                cwd=stages.ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=gpu_run.die_with_parent,
            )
        self.jobs.append(job)

    def read(self, job: Job, state: dict) -> bool:
        """Adds a job's new output to the report. Returns whether there was any."""
        path = self.scratch / f"{job.name}.jsonl"
        if not path.exists():
            return False
        with open(path, "rb") as file:
            file.seek(job.read)
            lines = file.read()
        lines = lines[: lines.rfind(b"\n") + 1]  # the last line may be incomplete
        job.read += len(lines)
        for line in map(json.loads, lines.splitlines()):
            self.take(job, state, line)
        return bool(lines)

    def take(self, job: Job, state: dict, line: dict) -> None:
        """Adds one line of a job's output to the report."""
        kind, part = line["kind"], line["part"]
        if kind == "started":
            job.started.append(part)
        elif kind == "ended":
            job.started.remove(part)
            if not job.started:
                job.done.add(part)
        elif kind == "figures" and part == "machine":
            self.report["machine"] |= line["figures"]
        elif kind == "figures":
            state["figures"].setdefault(part, {}).update(line["figures"])
        elif kind == "skipped":
            state["skipped"][part] = line["why"]
        elif kind == "failed":
            self.fail(job.section, part, line["error"], line["traceback"])

    def fail(self, section: str, part: str, error: str, trace: str) -> None:
        self.report["failed"].append({"section": section, "part": part, "error": error, "traceback": trace})

    def after(self, job: Job) -> list[Job]:
        """The jobs to run after a job. If a part crashed its process, restart it without that part."""
        status = job.process.returncode
        if status == 0:
            return []
        output = (self.scratch / f"{job.name}.log").read_text(errors="replace")[-3000:]
        if status != gpu_run.BROKEN:
            part = job.started[-1] if job.started else ""
            self.fail(job.section, part, f"its process exited with status {status}", output)
        if not job.started:
            return []
        job.done.add(job.started[-1])
        job.started.clear()
        return [job]

    def stop_all(self) -> None:
        """Kills all running processes and their children."""
        for job in self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
            self.read(job, self.report["sections"].get(job.section, {"figures": {}, "skipped": {}}))
        self.jobs.clear()

    def write(self) -> None:
        self.report["seconds"] = round(time.monotonic() - self.began, 1)
        runs.write_json(self.out / "gpu.json", self.report)

    def draw(self) -> None:
        """Writes the summary and the pictures. A failure is recorded like any other."""
        try:
            (self.out / "summary.md").write_text(gpu_report.summary(self.report), encoding="utf-8")
            gpu_report.pictures(self.report, self.out)
        except Exception as error:
            trace = traceback.format_exc()
            if trace not in [failure["traceback"] for failure in self.report["failed"]]:
                self.fail("pictures", "", gpu_run.first_line(error), trace)
                self.write()

    def finish(self) -> None:
        """Writes the final state of all files."""
        for state in self.report["sections"].values():
            if state["status"] == "running":
                state |= {"status": "cut off", "why": "the check was stopped"}
        self.report["finished"] = all(
            state["status"] not in ("cut off", "not reached") for state in self.report["sections"].values()
        )
        self.write()
        self.draw()


if __name__ == "__main__":
    cli.run(main)
