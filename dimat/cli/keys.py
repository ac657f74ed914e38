"""`dimat keys …`: makes agents' keys and certificates, and publishes the network map."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from dimat.cli.app import keys
from dimat.cli.shared import Json, say, show
from dimat.errors import ConfigError, SecurityError, unknown_agent

if TYPE_CHECKING:
    from dimat.net.pki.keyring import KeyFiles

Folder = Annotated[
    Path, Parameter(help="Folder of keys: NAME.key, NAME.crt and ca.crt; the organiser's folder also has ca.key.")
]
Addresses = Annotated[
    tuple[str, ...],
    Parameter(negative="", consume_multiple=False, help="The agent's addresses, host:port, separated by commas."),
]
Days = Annotated[
    int, Parameter(validator=validators.Number(gte=1, lte=36500), help="Days that the certificate is valid.")
]
KEYS = Path("keys")
YEAR = 365


@keys.command(name="init-ca")
def init_ca(
    *,
    folder: Folder = KEYS,
    name: Annotated[str, Parameter(help="Name of the collaboration, shown as issuer.")] = "dimat collaboration",
    days: Days = 10 * YEAR,
) -> int:
    """Make the collaboration's certificate authority: ca.key, which only the organiser keeps, and ca.crt, which every
    agent gets."""
    from dimat.net.pki.keyring import init_authority

    _tell(init_authority(folder, name, days), "CA")
    say(f"  keep {folder / 'ca.key'} where no agent runs: its holder can let anybody in")
    return 0


@keys.command
def issue(
    *names: Annotated[str, Parameter(help="Names of agents, as on the map. Without names: all agents of --map.")],
    addresses: Addresses = (),
    map_: Annotated[Path | None, Parameter(name="--map", help="Network map to take the addresses from.")] = None,
    folder: Folder = KEYS,
    days: Days = YEAR,
    renew: Annotated[
        bool, Parameter(negative="", help="Make new certificates for the existing keys, wherever the keys are.")
    ] = False,
    out: Annotated[
        Path | None, Parameter(help="Folder for the agents' files, with a copy of ca.crt; default: --folder.")
    ] = None,
) -> int:
    """Make agents' keys and certificates: NAME.key and NAME.crt. To remove an agent, take it off the map: the map says
    who may take part, and certificates are not revoked."""
    from dimat.net.pki.keyring import issue as issue_keys

    wanted = _wanted(names, addresses, map_, renew)
    for made in issue_keys(folder, wanted, days, renew=renew, out=out):
        _tell(made, "certificate of")
    return 0


@keys.command
def request(
    name: Annotated[str, Parameter(help="The agent's name, as on the map.")],
    /,
    *,
    addresses: Addresses = (),
    folder: Folder = KEYS,
    renew: Annotated[bool, Parameter(negative="", help="Make a new request for the existing key.")] = False,
) -> int:
    """Make a key, NAME.key, which never leaves this machine, and a certificate request, NAME.csr, to send to the
    organiser."""
    from dimat.net.pki.keyring import request as request_certificate

    _tell(request_certificate(folder, name, _listed(addresses), renew=renew), "request of")
    say("  send the .csr to the organiser, and read them the key above over another channel (telephone)")
    return 0


@keys.command
def sign(
    file: Annotated[Path, Parameter(help="The agent's request, NAME.csr.")],
    /,
    *,
    name: Annotated[
        str | None, Parameter(help="Agent that the request must be from; default: the file's name without .csr.")
    ] = None,
    folder: Folder = KEYS,
    days: Days = YEAR,
    renew: Annotated[bool, Parameter(negative="", help="Replace the agent's existing certificate.")] = False,
) -> int:
    """Make the certificate that an agent asks for, NAME.crt, with the folder's CA. It uses only the name, the addresses
    and the key in the request."""
    from dimat.net.pki.keyring import sign as sign_request

    made = sign_request(folder, file, days, name=name, renew=renew)
    _tell(made, "certificate of")
    say(f"  send {made.files[0]} and {folder / 'ca.crt'} back, once {made.name} has confirmed that this is its key")
    return 0


@keys.command(name="publish-map")
def publish_map(
    file: Annotated[Path, Parameter(help="Network map (TOML), with a version above the published one's.")],
    /,
    *,
    run: Annotated[str, Parameter(help="Name of the run whose agents follow the map.")],
    bootstrap: Annotated[
        tuple[str, ...],
        Parameter(
            negative="", consume_multiple=False, help="Address of a node of the run's DHT, as it prints it. Repeatable."
        ),
    ],
    folder: Annotated[Path, Parameter(name=("--keys", "--folder"), help="The organiser's folder, with ca.key.")] = KEYS,
    days: Annotated[
        int, Parameter(validator=validators.Number(gte=1, lte=366), help="Days that nodes keep the map.")
    ] = 30,
    listen: Annotated[str, Parameter(help="IP:port of the temporary DHT node; port 0: any free port.")] = "0.0.0.0:0",
) -> int:
    """Change who is in the network: sign a map with the CA's key and publish it in the DHT, for all agents with
    dht.follow_map = true. The command ends once a node has stored the map."""
    import asyncio

    from dimat.net.discovery.publish_map import publish_map as publish

    done = asyncio.run(
        publish(file, folder, run, bootstrap, days=days, listen=listen, notice=lambda message: say(f"dimat: {message}"))
    )
    until = datetime.fromtimestamp(done.until_s, UTC)
    say(
        f"version {done.version} of the network map, {done.agents} agents: with {done.nodes} DHT node"
        f"{'' if done.nodes == 1 else 's'}, until {until:%Y-%m-%d}; agents look about twice a minute"
    )
    return 0


@keys.command(name="show")
def show_keys(
    *paths: Annotated[Path, Parameter(help="Folders, or .crt, .csr and .key files; default: keys.")],
    as_json: Json = False,
) -> int:
    """Show certificates, keys and requests: name, addresses, fingerprints, days left, issuer, and whether key and
    certificate match. Warns of certificates that end within 30 days. Exit code 4 if a file cannot be used."""
    from dimat.net.pki.key_info import look_at
    from dimat.ui.terminal.keys import keys_json, keys_text

    found = look_at(paths or [KEYS])
    show(keys_json(found) if as_json else keys_text(found))
    return SecurityError.exit_code if any(facts.faults for facts in found) else 0


def _wanted(
    names: Sequence[str], addresses: Sequence[str], map_: Path | None, renew: bool
) -> dict[str, Sequence[str] | None]:
    """Return the addresses of the agents that get certificates; None keeps an agent's previous addresses."""
    if map_ is None:
        if not names:
            raise ConfigError("name the agents: dimat keys issue lab-a --addresses host:port, or --map FILE for all")
        if addresses and len(set(names)) > 1:
            raise ConfigError("--addresses belong to one agent; issue the others separately, or use --map for all")
        return dict.fromkeys(names, _listed(addresses) if addresses or not renew else None)
    if addresses:
        raise ConfigError("give --addresses or --map, not both")
    from dimat.config import TopologyConfig
    from dimat.topology import build_topology

    topology = build_topology(TopologyConfig(map=str(map_)))
    for name in names:
        if name not in topology.names:
            raise ConfigError(unknown_agent(str(map_), name, topology.names))
    return {name: topology.addresses.get(name, ()) for name in names or topology.names}


def _listed(addresses: Sequence[str]) -> list[str]:
    return [part.strip() for entry in addresses for part in entry.split(",") if part.strip()]


def _tell(made: KeyFiles, what: str) -> None:
    from dimat.ui.terminal.keys import made_lines

    for line in made_lines(made, what):
        say(line)
