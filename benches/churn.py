#!/usr/bin/env python3
"""Compares what repositories of ebackup and restic hold after days of small changes.

  benches/churn.py [--days 30] [--files 20000] [--keep 7] [--content text|random] [--work DIR]

Makes a folder of small files (about 5 KB each), then, day after day, changes one file in a hundred,
backs up, forgets all but the last --keep snapshots, and prunes, each tool with its own defaults;
prints the bytes of both repositories and of a fresh one with the last day only. Ours prunes twice a
day: what one run marks, the next one deletes.

EBACKUP names our binary [target/release/ebackup], RESTIC theirs [/opt/restic/usr/bin/restic, fetched
if missing].
"""
import argparse, os, pathlib, random, shutil, subprocess

here = pathlib.Path(__file__).resolve().parent
EBACKUP = os.environ.get("EBACKUP", here.parent / "target/release/ebackup")
RESTIC = os.environ.get("RESTIC", "/opt/restic/usr/bin/restic")


def run(*command):
    env = dict(os.environ, EBACKUP_PASSWORD="churn", RESTIC_PASSWORD="churn", XDG_CACHE_HOME=str(options.work / "cache"))
    done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Content:
    """Bytes of files: words of a made-up language, or noise."""

    def __init__(self, kind, rnd):
        self.rnd, self.pool = rnd, None
        if kind == "text":
            words = ["".join(rnd.choices("etaoinshrdlucmwfgypbvk", k=rnd.randint(3, 10))) for _ in range(5000)]
            weights = [1 / (n + 1) for n in range(5000)]
            self.pool = " ".join(rnd.choices(words, weights=weights, k=2_000_000)).encode()

    def file(self):
        length = int(min(self.rnd.lognormvariate(8.0, 1.0), 1 << 20))
        if self.pool is None:
            return self.rnd.randbytes(length)
        at = self.rnd.randrange(len(self.pool) - length)
        return self.pool[at : at + length]


class Ebackup:
    def __init__(self, path):
        self.path, self.repo = path, [EBACKUP, "--repo", path, "--quiet"]
        run(*self.repo, "init")

    def day(self, source, keep):
        run(*self.repo, "backup", source)
        run(*self.repo, "forget", "--keep-last", keep)
        run(*self.repo, "prune")
        run(*self.repo, "prune")

    def check(self):
        run(*self.repo, "check", "--read-data")


class Restic:
    def __init__(self, path):
        self.path, self.repo = path, [RESTIC, "-q", "-r", path]
        run(*self.repo, "init")

    def day(self, source, keep):
        run(*self.repo, "backup", source)
        run(*self.repo, "forget", "--keep-last", keep, "--prune")

    def check(self):
        run(*self.repo, "check")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--days", type=int, default=30)
parser.add_argument("--files", type=int, default=20_000)
parser.add_argument("--keep", type=int, default=7)
parser.add_argument("--content", choices=["text", "random"], default="text")
parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/var/tmp/ebackup-churn"))
options = parser.parse_args()

if not os.access(RESTIC, os.X_OK):
    run(here / "fetch-restic.sh", pathlib.Path(RESTIC).parents[2])
shutil.rmtree(options.work, ignore_errors=True)
source = options.work / "source"
rnd = random.Random(1)
content = Content(options.content, rnd)
files = [source / f"d{n % 100:02}" / f"f{n:06}" for n in range(options.files)]
for file in files:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.file())
tools = [Ebackup(options.work / "ebackup"), Restic(options.work / "restic")]
print("| day | files MiB | ebackup MiB | restic MiB | restic / ebackup |\n|---|---|---|---|---|")


def report(day, sizes):
    sizes = [size(source), *sizes]
    print(f"| {day} |", " | ".join(f"{n / 2**20:.1f}" for n in sizes), f"| {sizes[2] / sizes[1]:.2f} |", flush=True)


for day in range(options.days + 1):
    if day:
        for file in rnd.sample(files, max(1, options.files // 100)):
            file.write_bytes(content.file())
    for tool in tools:
        tool.day(source, options.keep)
    if day % 5 == 0:
        report(day, [size(tool.path) for tool in tools])
for tool in tools:
    tool.check()
fresh = [Ebackup(options.work / "fresh-ebackup"), Restic(options.work / "fresh-restic")]
for tool in fresh:
    tool.day(source, 1)
report("fresh", [size(tool.path) for tool in fresh])
shutil.rmtree(options.work)
