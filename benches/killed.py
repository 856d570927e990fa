#!/usr/bin/env python3
"""Measures what a backup that is killed makes the next one forget.

  benches/killed.py [--gib 1 5 20] [--at 0.8] [--work DIR]

Saves a file of random bytes into a repository, kills the backup with SIGKILL when a part (--at) of it is
stored, and runs it again. What the second run stores beyond what was missing is what the first had
uploaded and nobody knew of any more: at most 5 % of it, or 4 packs.

EBACKUP names our binary [target/release/ebackup]. EBACKUP_REPO, if set, names a bucket; a prefix is added
for each size, and the variables of the command say how to reach it.
"""
import argparse, json, os, pathlib, shutil, signal, subprocess, time

here = pathlib.Path(__file__).resolve().parent
EBACKUP = os.environ.get("EBACKUP", here.parent / "target/release/ebackup")
PACK = 40 << 20


def command(repo, *args):
    return [str(EBACKUP), "--repo", repo, "--json", *map(str, args)]


def last(output):
    return json.loads(output.strip().splitlines()[-1])


def stored(repo):
    """Bytes of the packs that are there."""
    folder = pathlib.Path(repo)
    if folder.is_dir():
        return sum(path.stat().st_size for path in (folder / "packs").rglob("*") if path.is_file() and path.name[0] != ".")
    data = last(subprocess.run(command(repo, "stats"), capture_output=True, text=True, env=env, check=True).stdout)["data"]
    return data["bytes"]


def measure(gib):
    source, bucket = options.work / "source", os.environ.get("EBACKUP_REPO")
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    size = int(gib * (1 << 30))
    with open(source / "file", "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    time.sleep(3)
    repo = f"{bucket}/{time.time_ns()}" if bucket else str(options.work / "repository")
    if not bucket:
        shutil.rmtree(repo, ignore_errors=True)
    subprocess.run(command(repo, "init"), env=env, capture_output=True, check=True)
    run = subprocess.Popen(command(repo, "backup", source), env=env, stdout=subprocess.PIPE, text=True)
    # Progress tells what was read, which is a few packs ahead of what is stored.
    for line in run.stdout:
        status = json.loads(line)
        if status["type"] == "status" and status["bytes"] >= options.at * size:
            break
    run.send_signal(signal.SIGKILL)
    run.wait()
    uploaded = stored(repo)
    again = subprocess.run(command(repo, "backup", source), env=env, capture_output=True, text=True, check=True)
    forgotten = last(again.stdout)["bytes_stored"] - (size - uploaded)
    allowed = max(uploaded * 0.05, 4 * PACK)
    verdict = "PASS" if forgotten <= allowed else "FAIL"
    mib = 1 << 20
    print(f"| {gib} GiB | {uploaded / mib:.0f} | {forgotten / mib:.0f} | {100 * forgotten / uploaded:.1f} % | {allowed / mib:.0f} | {verdict} |", flush=True)
    shutil.rmtree(source)
    if not bucket:
        shutil.rmtree(repo)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--gib", type=float, nargs="+", default=[1, 5, 20])
parser.add_argument("--at", type=float, default=0.8)
parser.add_argument("--work", type=pathlib.Path, default="/var/tmp/ebackup-killed")
options = parser.parse_args()
env = dict(os.environ, EBACKUP_PASSWORD="killed")
print("| data | MiB uploaded when killed | MiB forgotten | | MiB allowed | |\n|---|---|---|---|---|---|")
for gib in options.gib:
    measure(gib)
shutil.rmtree(options.work, ignore_errors=True)
