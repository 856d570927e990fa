#!/bin/bash
# Compares whole runs of ebackup with restic and rustic on the same data, in turn, and prints medians and
# ratios (theirs / ours) of wall time, CPU time, peak memory and repository size as Markdown.
#
#   benches/compare.sh [--quick] [DATASET...]     data sets: rand tree small pg; default: all
#
#   --quick         a tenth of the data, one round: to see that it works
#   EBACKUP         our binary [target/release/ebackup, built if missing]
#   RESTIC, RUSTIC  theirs [/opt/restic/usr/bin/restic, fetched from Debian if missing; /opt/rustic/bin/rustic]
#   DATA            folder with data sets made before [/root/data]; what it lacks is made in WORK
#   WORK            folder for repositories and restored data [/var/tmp/ebackup-compare], needs some 10 GB and 25 GB a round: what was
#                   restored is removed at the end, since ext4 is slow to give out inodes freed minutes ago
#   ROUNDS          rounds of which the median is taken [3]
#
# What is fair about it: every tool reads data from a warm page cache, in turn (A B C, then B C A: whoever comes first gets
# the memory that nobody used lately, which on a virtual machine can double the time), with its own
# defaults, to repositories on one file system. Before all, most free memory is touched once, because
# memory a virtual machine never touched is slow at first, which would burden whoever runs first.
# What is not: restic's and rustic's passwords are stretched by scrypt (about half a second of CPU for
# restic, as it comes); ours is a key file. Nobody is asked to sync more than by default: ours syncs every
# object it writes to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."

QUICK=
SETS=()
for arg in "$@"; do
  case $arg in
    --quick) QUICK=1 ;;
    -h | --help) sed -n '2,/^set /p' "$0" | grep '^#' | cut -c3-; exit ;;
    rand | tree | small | pg) SETS+=("$arg") ;;
    *) echo "'$arg' is no data set" >&2; exit 2 ;;
  esac
done
[ ${#SETS[@]} -gt 0 ] || SETS=(rand tree small pg)
ROUNDS=${ROUNDS:-$([ -n "$QUICK" ] && echo 1 || echo 3)}
DATA=${DATA:-/root/data}
WORK=${WORK:-/var/tmp/ebackup-compare}
RESTIC=${RESTIC:-/opt/restic/usr/bin/restic}
RUSTIC=${RUSTIC:-/opt/rustic/bin/rustic}
if [ -z "${EBACKUP:-}" ]; then
  EBACKUP=${CARGO_TARGET_DIR:-target}/release/ebackup
  cargo build --quiet --release -p mover --bin ebackup
fi
EBACKUP=$(realpath "$EBACKUP")
mkdir -p "$WORK"
WORK=$(realpath "$WORK")
export XDG_CONFIG_HOME=$WORK/config XDG_CACHE_HOME=$WORK/cache RESTIC_PASSWORD=bench RUSTIC_PASSWORD=bench
say() { echo "$@" >&2; }

# --- tools -------------------------------------------------------------------------------------------
[ -x "$RESTIC" ] || { say "fetching restic"; benches/fetch-restic.sh "${RESTIC%/usr/bin/restic}"; }
TOOLS=(ebackup ebackup-128M restic)
if [ -x "$RUSTIC" ]; then
  TOOLS+=(rustic)
else
  say "no rustic at $RUSTIC: cargo install rustic-rs --locked --root /opt/rustic"
fi

# --- data --------------------------------------------------------------------------------------------
make_rand() {
  mkdir -p "$1"
  head -c $(($2 << 20)) /dev/urandom >"$1/r"
}
make_tree() {
  mkdir -p "$1"
  cp -a ~/.cargo/registry/src/. "$1"
}
make_small() { # $2 text files in 400 folders, about 5 KB each
  python3 - "$1" "$2" <<'PY'
import os, random, sys
root, count = sys.argv[1], int(sys.argv[2])
rnd = random.Random(1)
words = ["".join(rnd.choices("etaoinshrdlucmwfgypbvk", k=rnd.randint(3, 10))) for _ in range(5000)]
pool = " ".join(rnd.choices(words, weights=[1 / (n + 1) for n in range(5000)], k=2_000_000)).encode()
for n in range(count):
    folder = f"{root}/d{n % 400:03}"
    if n < 400:
        os.makedirs(folder, exist_ok=True)
    size = int(min(rnd.lognormvariate(8.0, 1.0), 1 << 20))
    at = rnd.randrange(len(pool) - size)
    with open(f"{folder}/f{n:06}.txt", "wb") as f:
        f.write(pool[at:at + size])
PY
}
make_pg() { # a folder of PostgreSQL after pgbench -i -s $2
  local bin run home
  if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y postgresql postgresql-contrib >/dev/null
  fi
  bin=$(dirname "$(ls /usr/lib/postgresql/*/bin/initdb | tail -1)")
  home=$(mktemp -d /var/tmp/ebackup-pg.XXXXXX) # whose parents the user postgres may pass
  run="runuser -u postgres --"
  chown postgres "$home"
  (
    cd "$home"
    $run "$bin/initdb" -D "$home/data" -A trust
    $run "$bin/pg_ctl" -D "$home/data" -w -o "-k $home -p 55433 -c listen_addresses=" -l "$home/log" start
    $run "$bin/createdb" -h "$home" -p 55433 bench
    $run "$bin/pgbench" -h "$home" -p 55433 -i -q -s "$2" bench
    $run "$bin/pg_ctl" -D "$home/data" -w -m fast stop
  ) >/dev/null 2>&1
  mv "$home/data" "$1"
  rm -r "$home"
}
declare -A SOURCE
prepare() {
  local set=$1 made=$WORK/data/$1
  if [ -n "$QUICK" ]; then
    made=$WORK/quick/$set
  elif [ -d "$DATA/$set" ]; then
    SOURCE[$set]=$DATA/$set
    return
  fi
  SOURCE[$set]=$made
  if [ ! -e "$made.done" ]; then
    say "making data: $set"
    rm -rf "$made"
    mkdir -p "$(dirname "$made")"
    case $set in
      rand) make_rand "$made" $([ -n "$QUICK" ] && echo 205 || echo 2048) ;;
      small) make_small "$made" $([ -n "$QUICK" ] && echo 20000 || echo 200000) ;;
      pg) make_pg "$made" $([ -n "$QUICK" ] && echo 8 || echo 80) ;;
      tree)
        make_tree "$made"
        if [ -n "$QUICK" ]; then # every tenth package
          find "$made" -mindepth 2 -maxdepth 2 -type d | sort | awk 'NR % 10' | xargs -r rm -rf
        fi
        ;;
    esac
    touch "$made.done"
  fi
}

# --- measuring ---------------------------------------------------------------------------------------
# Runs a command and appends "label<TAB>wall<TAB>cpu<TAB>rss MiB" to the results. The wrapper is small, since
# the system counts what it holds when it starts a command into that command's peak.
cat >"$WORK/measure.py" <<'PY'
import os, subprocess, sys, time
results, label, *command = sys.argv[1:]
begun = time.monotonic()
child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
errors = child.stderr.read()
_, status, usage = os.wait4(child.pid, 0)
wall = time.monotonic() - begun
if status:
    sys.stderr.buffer.write(errors)
    sys.exit(f"{' '.join(command)}: status {status}")
with open(results, "a") as out:
    print(label, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, sep="\t", file=out)
PY
RESULTS=$WORK/results.tsv
: >"$RESULTS"
measure() { # label command...
  local label=$1
  shift
  say "  $label: $*"
  python3 "$WORK/measure.py" "$RESULTS" "$label" "$@"
}
warm() { find "$1" -type f -print0 | xargs -0 cat >/dev/null; }
settle() { sync; } # so that nobody pays for what the one before left to be written

command_of() { # tool operation repository source target: prints the words of the command, one a line
  local tool=$1 op=$2 repo=$3 source=$4 target=$5 words=()
  case $tool:$op in
    ebackup*:init) words=("$EBACKUP" --repo "$repo" init) ;;
    ebackup*:first | ebackup*:again) words=("$EBACKUP" --repo "$repo" --quiet backup "$source") ;;
    ebackup*:restore) words=("$EBACKUP" --repo "$repo" --quiet restore latest --target "$target") ;;
    restic:init) words=("$RESTIC" -q -r "$repo" init) ;;
    restic:first | restic:again) words=("$RESTIC" -q -r "$repo" backup "$source") ;;
    restic:restore) words=("$RESTIC" -q -r "$repo" restore "latest:$source" --target "$target") ;;
    rustic:init) words=("$RUSTIC" --no-progress --log-level error -r "$repo" init) ;;
    rustic:first | rustic:again) words=("$RUSTIC" --no-progress --log-level error -r "$repo" backup "$source") ;;
    rustic:restore) words=("$RUSTIC" --no-progress --log-level error -r "$repo" restore "latest:$source" "$target") ;;
  esac
  [ "$tool" != ebackup-128M ] || words+=(--memory 128M)
  printf '%s\n' "${words[@]}"
}
run_tool() { # label tool operation…: measures it
  local label=$1 words
  shift
  mapfile -t words < <(command_of "$@")
  measure "$label" "${words[@]}"
}
floor() { # source: what reading, compressing on two cores and writing cost at the least
  measure "$2" bash -c "tar -C '$1' -cf - . | zstd -q -3 -T2 -o '$WORK/floor.zst' -f"
  rm -f "$WORK/floor.zst"
}

touch_memory() {
  python3 - <<'PY'
import mmap
free = next(int(l.split()[1]) for l in open("/proc/meminfo") if l.startswith("MemAvailable")) * 1024
size = int(free * 0.7) & ~0xfff
memory = mmap.mmap(-1, size)
for at in range(0, size, 4096):
    memory[at] = 1
PY
}

compare() { # set
  local set=$1 source=${SOURCE[$1]} round tool repo target words
  for ((round = 1; round <= ROUNDS; round++)); do
    say "$set, round $round of $ROUNDS"
    for tool in "${TOOLS[@]}"; do
      repo=$WORK/repo/$tool
      target=$WORK/target/$set.$round/$tool
      rm -rf "$repo"
      mkdir -p "$WORK/repo" "${target%/*}"
      mapfile -t words < <(command_of "$tool" init "$repo" "$source" "$target")
      "${words[@]}" >/dev/null 2>&1
    done
    for op in first again restore; do
      for tool in "${TOOLS[@]:(round - 1) % ${#TOOLS[@]}}" "${TOOLS[@]:0:(round - 1) % ${#TOOLS[@]}}"; do
        warm "$source"
        settle
        run_tool "$set/$op/$tool" "$tool" "$op" "$WORK/repo/$tool" "$source" "$WORK/target/$set.$round/$tool"
      done
      if [ $op = first ]; then
        warm "$source"
        settle
        floor "$source" "$set/first/tar+zstd"
      fi
    done
    for tool in "${TOOLS[@]}"; do
      printf '%s\t%s\n' "$set/size/$tool" "$(du -sm --apparent-size "$WORK/repo/$tool" | cut -f1)" >>"$RESULTS"
      if [ "$round" = 1 ]; then
        if diff -r --no-dereference "$source" "$WORK/target/$set.$round/$tool" >"$WORK/diff" 2>&1; then
          echo "$set/verified/$tool" >>"$RESULTS"
        else
          say "  $tool: what was restored DIFFERS:"
          head -3 "$WORK/diff" >&2
        fi
      fi
    done
  done
}

report() {
  local set
  echo "## Compared with others"
  echo
  echo "$(date -u +%F), $(nproc) x $(awk -F': ' '/model name/{print $2; exit}' /proc/cpuinfo), $(awk '/MemTotal/{printf "%.0f GiB", $2 / 1048576}' /proc/meminfo), $(findmnt -no FSTYPE -T "$WORK"), load before $LOAD; median of $ROUNDS rounds."
  echo "$("$EBACKUP" --version), $("$RESTIC" version | cut -d' ' -f1,2)$([ -x "$RUSTIC" ] && echo ", $("$RUSTIC" --version)"). Ratio in parentheses: theirs / ours; above 1 is in our favour."
  echo
  echo "Data:"
  for set in "${SETS[@]}"; do
    echo "- $set: ${SOURCE[$set]}, $(find "${SOURCE[$set]}" -type f | wc -l) files, $(du -sm --apparent-size "${SOURCE[$set]}" | cut -f1) MiB"
  done
  echo
  echo "Commands:"
  for tool in "${TOOLS[@]}"; do
    for op in first restore; do
      echo "- \`$(command_of "$tool" $op REPO SOURCE TARGET | tr '\n' ' ' | sed 's/ $//')\`"
    done
  done
  echo "- \`tar -C SOURCE -cf - . | zstd -q -3 -T2\`"
  python3 - "$RESULTS" "${SETS[*]}" <<'PY'
import statistics, sys
runs, verified = {}, set()
for line in open(sys.argv[1]):
    label, *numbers = line.rstrip("\n").split("\t")
    if numbers:
        runs.setdefault(label, []).append([float(n) for n in numbers])
    else:
        verified.add(label)
median = {label: [statistics.median(c) for c in zip(*rows)] for label, rows in runs.items()}
ops = {"first": "first backup", "again": "unchanged backup", "restore": "restore"}
for set_ in sys.argv[2].split():
    print(f"\n### {set_}\n\n| | tool | wall s | CPU s | peak MiB |\n|---|---|---|---|---|")
    for op, name in ops.items():
        ours = median[f"{set_}/{op}/ebackup"]
        for label, row in median.items():
            where, what, tool = label.split("/")
            if (where, what) != (set_, op):
                continue
            def cell(n, digits):
                own = f"{row[n]:.{digits}f}"
                return own if tool == "ebackup" else f"{own} ({row[n] / max(ours[n], 1e-9):.2f})"
            print(f"| {name} | {tool} | {cell(0, 2)} | {cell(1, 2)} | {cell(2, 0)} |")
    ours = median[f"{set_}/size/ebackup"][0]
    for label, row in median.items():
        if label.startswith(f"{set_}/size/"):
            tool = label.split("/")[2]
            same = "restored equal" if f"{set_}/verified/{tool}" in verified else "RESTORED DIFFERENT"
            print(f"| repository | {tool} | {row[0]:.0f} MiB ({row[0] / ours:.2f}) | {same} | |")
PY
}

LOAD=$(cut -d' ' -f1-3 /proc/loadavg)
for set in "${SETS[@]}"; do prepare "$set"; done
say "touching memory"
touch_memory
for set in "${SETS[@]}"; do compare "$set"; done
rm -rf "$WORK/repo" "$WORK/target"
report | tee "$WORK/report.md"
