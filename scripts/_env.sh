# Sourced by the other scripts: an environment of its own for this checkout.
#   LOOP_LENS_VENV   where it lies (default .venv)
#   LOOP_LENS_TORCH  which torch to install first (default torch==2.13.0)

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${LOOP_LENS_VENV:-$root/.venv}"
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

# ensure_env EXTRAS: create the environment with these extras ("base" for none) unless it is there already.
ensure_env() {
    local extras="$1" stamp wanted python
    # What is there for development has everything.
    stamp="$venv/.installed-dev"
    wanted="$(cksum < "$root/pyproject.toml")"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return 0
    stamp="$venv/.installed-$extras"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return 0
    echo "Setting up $venv (a few minutes, once) ..." >&2
    python="$(command -v python3.11 || command -v python3)"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    # torch first: its version decides which build everything else brings along.
    "$venv/bin/python" -m pip install --quiet "${LOOP_LENS_TORCH:-torch==2.13.0}"
    "$venv/bin/python" -m pip install --quiet -e "$root$([ "$extras" = base ] || echo "[$extras]")"
    echo "$wanted" > "$stamp"
}
