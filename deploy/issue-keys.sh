#!/usr/bin/env bash
# Makes keys and certificates of all agents of a network, each agent's in a folder of its own, ready to be carried to its
# machine or mounted into its container:
#
#   FOLDER/ca.key  FOLDER/ca.crt                    the collaboration's CA; made if there is none
#   FOLDER/NAME/{NAME.key,NAME.crt,ca.crt}          what agent NAME needs: its `agent.keys`
#
# Run it again whenever agents are added: what is there is left as it is, nothing is ever overwritten. It is for one
# organiser who sets up all machines; where labs keep their keys to themselves, see docs/keys.md.
set -euo pipefail
umask 077

usage() {
    cat <<'END'
usage: issue-keys.sh [--folder FOLDER] [--days N] --map MAP
       issue-keys.sh [--folder FOLDER] [--days N] NAME=HOST:PORT[,HOST:PORT...] ...

  --map MAP        network map (TOML): keys of all its agents, with their addresses
  --folder FOLDER  where they go (default: keys)
  --days N         how long new certificates are valid (default: 365)

DIMAT names the program where it is not `dimat` on PATH.
END
}

fail() {
    echo "issue-keys.sh: $*" >&2
    exit 2
}

folder=keys
days=365
map=
agents=()
while [ $# -gt 0 ]; do
    case $1 in
        --map | --folder | --days)
            [ $# -ge 2 ] || fail "$1 needs a value; see --help"
            declare "${1#--}=$2"
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        -*) fail "there is no option $1; see --help" ;;
        *=*) agents+=("$1") ;;
        *) fail "'$1' has no address; give NAME=HOST:PORT, or --map MAP" ;;
    esac
    shift
done
if [ -n "$map" ]; then
    [ ${#agents[@]} -eq 0 ] || fail "give --map or agents, not both"
    [ -f "$map" ] || fail "there is no map $map"
elif [ ${#agents[@]} -eq 0 ]; then
    fail "which agents? give --map MAP, or NAME=HOST:PORT for each; see --help"
fi
dimat=${DIMAT:-dimat}
command -v "$dimat" >/dev/null || fail "there is no program '$dimat'; activate its virtual environment, or set DIMAT"

if [ -n "$map" ]; then
    graph=$(mktemp -d)
    trap 'rm -rf "$graph"' EXIT
    said=$("$dimat" topology export "$map" "$graph/map.graphml" 2>&1) || {
        code=$?
        echo "$said" >&2
        exit "$code"
    }
    mapfile -t agents < <(sed -n 's/.*<node id="\([^"]*\)".*/\1/p' "$graph/map.graphml")
    [ ${#agents[@]} -gt 0 ] || fail "$map names no agents"
fi

if [ ! -e "$folder/ca.key" ] || [ ! -e "$folder/ca.crt" ]; then
    "$dimat" keys init-ca --folder "$folder"
fi
for agent in "${agents[@]}"; do
    name=${agent%%=*}
    own=$folder/$name
    if [ -e "$own/$name.key" ] && [ -e "$own/$name.crt" ] && [ -e "$own/ca.crt" ]; then
        echo "$name has its keys in $own; they are left as they are" >&2
    elif [ -n "$map" ]; then
        "$dimat" keys issue "$name" --map "$map" --folder "$folder" --out "$own" --days "$days"
    else
        "$dimat" keys issue "$name" --addresses "${agent#*=}" --folder "$folder" --out "$own" --days "$days"
    fi
done
