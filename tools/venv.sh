# Source this file: it enters the checkout, makes its virtual environment (.venv) when it is absent or out of date, and
# activates it. PYTHON names another interpreter than python3. A second run reuses what is there.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

edgepeft_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        # The base interpreter, since .venv may be the active environment and is about to be replaced.
        "$candidate" -c 'import sys, venv, ensurepip; sys.version_info < (3, 11) and sys.exit(1)
print(sys._base_executable)' 2>/dev/null && return
    done
    echo "No Python 3.11 or newer with venv was found (tried: ${PYTHON:-python3, python3.11 to python3.14, python})." >&2
    echo "Install one (on Debian and Ubuntu also python3-venv), or name it: PYTHON=/path/to/python3 bash $0" >&2
    return 1
}

edgepeft_venv() {
    local python wanted stamp=.venv/edgepeft.stamp
    python=$(edgepeft_find_python) || return 1
    # What the environment depends on: the place (it cannot be moved), the interpreter, the pins, and what is required.
    wanted=$("$python" - <<'PYTHON'
import hashlib, json, pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
required = [project["build-system"], project["project"], project["tool"]["hatch"]]
pins = pathlib.Path("constraints.txt").read_text()
print(hashlib.sha256(json.dumps([str(pathlib.Path.cwd()), sys.version, pins, required]).encode()).hexdigest())
PYTHON
    ) || return 1
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "== setting up .venv with $("$python" -V) (once; a few minutes, mostly downloads)"
        "$python" -m venv --clear .venv || return 1
        # torch comes first and alone: a plain requirement takes a build that the machine already offers, where it offers one.
        echo "== installing $(grep '^torch==' constraints.txt)"
        .venv/bin/python -m pip install -qq --disable-pip-version-check "$(grep '^torch==' constraints.txt)" || return 1
        echo "== installing edgepeft[dev,genai] as pinned in constraints.txt"
        .venv/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,genai]' || return 1
        echo "$wanted" >"$stamp"
    fi
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    hash -r
}

edgepeft_venv || exit 1
