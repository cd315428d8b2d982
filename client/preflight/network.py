"""The way to the coordinator, one step after the other: proxy, name, port, TLS, clock, SuperLink.

A step that cannot be tried because an earlier one failed is not tried, and says so.

Design: the proxy rules are those of httpx, by which the agent calls. A proxy's password is never
told. ``client.agent.knock`` asks the SuperLink itself; it takes no seat there.
"""

from __future__ import annotations

import base64
import socket
import ssl
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies_environment

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from client.preflight.base import Case, Finding, duration, several
from client.preflight.settings import name_of, read_authority
from shared_models.errors import DocumentError

CONNECT_S = 10.0
#: Flower refuses a site whose clock is further from the SuperLink's (``flwr.common.constant``).
MOST_AHEAD_S, MOST_BEHIND_S = 5.0, 305.0
DRIFT_S = 2.0  # a clock that is kept in time is nearer than that
EXPIRED, WRONG_HOST = (9, 10), (62, 64)  # OpenSSL's X509_V_ERR_*
DAYS_LEFT = 14


class ProxyError(Exception):
    """The proxy did not open a way; ``status`` is what it answered, 0 if that was no HTTP."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"status {status}")


class Host(NamedTuple):
    """An address taken apart."""

    name: str
    port: int

    @property
    def is_address(self) -> bool:
        """Whether it is an address already, and no name."""
        try:
            return bool(ip_address(self.name))
        except ValueError:
            return False

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        return self.name == "localhost" or (self.is_address and ip_address(self.name).is_loopback)


def host_of(address: str) -> Host:
    """Return the parts of ``host:port``."""
    name, _, port = address.rpartition(":")
    return Host(name.strip("[]"), int(port))


def proxy_for(host: Host, proxies: Mapping[str, str]) -> SplitResult | None:
    """Return the proxy httpx would use for an https connection, of those in the environment."""
    url = proxies.get("https") or proxies.get("all")
    if not url or host.is_loopback:
        return None
    if any(_is_exempt(host, entry.strip()) for entry in proxies.get("no", "").split(",")):
        return None
    return urlsplit(url if "://" in url else f"http://{url}")


def proxy(case: Case) -> Iterator[Finding]:
    """Yield which way the connection takes, and what in the settings of proxies has no effect."""
    host, proxies = host_of(case.config.link.address), getproxies_environment()
    found = proxy_for(host, proxies)
    if found is None:
        given = bool(proxies.get("https") or proxies.get("all")) and not host.is_loopback
        said = "NO_PROXY exempts the coordinator; direct" if given else "none; direct"
        yield Finding("proxy", True, said, "network")
        return
    through = f"through {found.hostname}:{found.port or 80}"
    vain = [e.strip() for e in proxies.get("no", "").split(",") if "*." in e or "/" in e]
    if found.scheme not in ("http", "https"):
        said = f"{through}, a proxy of a kind the agent does not speak"
        yield Finding("proxy", False, said, "network", "set https_proxy to an http:// proxy")
    elif vain:
        said = f"{through}; {several(len(vain), 'entry').replace('entrys', 'entries')} of NO_PROXY "
        said += "with * or / " + ("has" if len(vain) == 1 else "have") + " no effect"
        cure = "write NO_PROXY as plain names: .example.org exempts all of example.org's hosts"
        yield Finding("proxy", None, said, "network", cure)
    else:
        yield Finding("proxy", True, f"{through} (https_proxy)", "network")


def name(case: Case) -> Iterator[Finding]:
    """Yield whether the coordinator's name is known here."""
    host = host_of(case.config.link.address)
    if host.is_address:
        yield Finding("name", True, "an address; nothing to look up", "network")
        return
    if proxy_for(host, getproxies_environment()) is not None:
        yield Finding("name", None, "left to the proxy", "network")
        return
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host.name, host.port)}
    except (OSError, UnicodeError):
        said = f"{host.name} is not known to this machine's DNS"
        cure = "check link.address in site.toml, then have the name resolved for this machine"
        yield Finding("name", False, said, "network", cure)
        return
    said = f"{host.name} is {', '.join(sorted(map(str, found))[:3])}"
    yield Finding("name", True, said, "network", figures={"addresses": len(found)})


def port(case: Case) -> Iterator[Finding]:
    """Yield whether a connection can be opened."""
    try:
        dial(case).close()
    except (OSError, ProxyError, UnicodeError) as error:
        yield _unopened(error, case)
        return
    yield Finding("port", True, f"{case.config.link.address} accepts connections", "network")


def tls(case: Case) -> Iterator[Finding]:
    """Yield whether who answers is certified by the consortium's own authority."""
    address, host = case.config.link.address, host_of(case.config.link.address)
    authority = read_authority(case.config.link.root_certificates)
    if authority is None:
        yield _not_tried("TLS", "without the authority's certificate")
        return
    try:
        trusting = _context(case)
        with dial(case) as raw, trusting.wrap_socket(raw, server_hostname=host.name) as stream:
            version = stream.version()
            shown = stream.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        yield _mistrusted(error, case, authority)
        return
    except (ProxyError, socket.gaierror, ConnectionRefusedError, UnicodeError):
        yield _not_tried("TLS", "without a connection")
        return
    except ssl.SSLError as error:
        said = f"what answers at {address} does not speak TLS ({error.reason or 'broken off'})"
        cure = "check link.address; on the coordinator's side, that TLS is served at this port"
        yield Finding("TLS", False, said, "server", cure)
        return
    except OSError:
        said = "the connection is opened, and dropped when TLS begins"
        cure = f"let the firewall pass TLS to {address} without looking into it"
        yield Finding("TLS", False, said, "network", cure)
        return
    found = x509.load_der_x509_certificate(shown or b"")
    yield _trusted(found, version or "TLS")


def clock_and_superlink(case: Case) -> Iterator[Finding]:
    """Yield how far the clocks are apart, and whether the SuperLink knows this site's key."""
    import httpx

    from client import agent

    link = case.config.link
    try:
        known = agent.knock(agent.FleetLink(link.address, link.root_certificates, link.node_key))
    except (DocumentError, httpx.HTTPError) as error:
        why = "without keys" if isinstance(error, DocumentError) else "without TLS"
        yield _not_tried("clock", why)
        yield _not_tried("SuperLink", why)
        return
    if known.date is not None:
        # the header tells whole seconds: half of one is the best guess
        case.skew_s = parsedate_to_datetime(known.date).timestamp() + 0.5 - known.at
        yield clock_finding(case.skew_s, known.round_trip_s)
    else:
        yield Finding("clock", None, "the coordinator's answer states no time", "this machine")
    yield _superlink(known, case)


def clock_finding(skew_s: float, round_trip_s: float) -> Finding:
    """Judge the clock: ``skew_s`` is the coordinator's less this machine's."""
    ahead = -skew_s
    side = "ahead of" if ahead > 0 else "behind"
    said = f"{duration(abs(ahead))} {side} the coordinator's"
    figures = {"skew_s": round(skew_s, 2), "round_trip_s": round(round_trip_s, 4)}
    cure = (
        "turn on time synchronisation on this machine (chrony, systemd-timesyncd); if its time is "
        "right, the coordinator's is wrong"
    )
    if ahead > MOST_AHEAD_S or ahead < -MOST_BEHIND_S:
        said += f"; over {MOST_AHEAD_S:g} s ahead or {MOST_BEHIND_S:g} s behind, nobody is let in"
        return Finding("clock", False, said, "this machine", cure, figures)
    is_kept = True if abs(ahead) <= DRIFT_S else None
    return Finding("clock", is_kept, said, "this machine", cure, figures)


def dial(case: Case) -> socket.socket:
    """Open a connection to the coordinator, by the proxy if one applies.

    Raises:
        OSError: if there is no connection.
        ProxyError: if the proxy opens none.
    """
    host = host_of(case.config.link.address)
    found = proxy_for(host, getproxies_environment())
    if found is None:
        return socket.create_connection(host, CONNECT_S)
    raw = socket.create_connection((found.hostname or "", found.port or 80), CONNECT_S)
    try:
        if found.scheme == "https":
            raw = ssl.create_default_context().wrap_socket(raw, server_hostname=found.hostname)
        raw.sendall(_connect(host, found))
        head = b""
        while b"\r\n\r\n" not in head and len(head) < 16384 and (part := raw.recv(1)):
            head += part
        words = head.split(b"\r\n")[0].split()
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        if not 200 <= status < 300:
            raise ProxyError(status)
    except BaseException:
        raw.close()
        raise
    return raw


def _connect(host: Host, found: SplitResult) -> bytes:
    target = f"[{host.name}]:{host.port}" if ":" in host.name else f"{host.name}:{host.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if found.username is not None:
        pair = f"{unquote(found.username)}:{unquote(found.password or '')}".encode()
        lines.append(f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}")
    return "\r\n".join([*lines, "", ""]).encode()


def _is_exempt(host: Host, entry: str) -> bool:
    """Tell whether an entry of NO_PROXY exempts ``host``, as httpx reads it."""
    if "://" in entry:
        found = urlsplit(entry)
        if found.scheme not in ("https", "all") or found.port not in (None, host.port):
            return False
        return (found.hostname or "").lower() == host.name.lower()
    if entry == "*" or entry.strip("[]") == host.name:
        return bool(entry)
    name, _, port = entry.rpartition(":")
    if port.isdigit() and name and not Host(entry, 0).is_address:
        if int(port) != host.port or host.port == 443:  # of its own port httpx keeps nothing
            return False
        entry = name
    if not entry or host.is_address or Host(entry, 0).is_address:
        return bool(entry) and entry == host.name
    mine, theirs = host.name.lower(), entry.lower()
    if theirs.startswith("."):
        return mine.endswith(theirs)
    return mine == theirs or mine.endswith(f".{theirs}")


def _context(case: Case, *, is_trusting: bool = False) -> ssl.SSLContext:
    """Return the context the agent uses, or one that only listens to who answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if is_trusting:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    context.load_verify_locations(case.config.link.root_certificates)
    return context


def _mistrusted(
    error: ssl.SSLCertVerificationError, case: Case, authority: x509.Certificate
) -> Finding:
    """Say whose certificate was shown instead, and what that means."""
    address, host = case.config.link.address, host_of(case.config.link.address)
    with (
        dial(case) as raw,
        _context(case, is_trusting=True).wrap_socket(raw, server_hostname=host.name) as stream,
    ):
        shown = x509.load_der_x509_certificate(stream.getpeercert(binary_form=True) or b"")
    issuer, ours = name_of(shown.issuer), name_of(authority.subject)
    if _is_issued_by(shown, authority):
        said, cure = _wrong_of_ours(error.verify_code, shown, host)
        return Finding("TLS", False, said, "server", cure)
    if shown.issuer == authority.subject:
        said = f"the certificate names {ours}, but another of that name signed it"
        cure = "compare the authority's fingerprint with the coordinator by phone"
        return Finding("TLS", False, said, "server", cure)
    said = (
        f"interception: the certificate shown is issued by {issuer}, not by the consortium's {ours}"
    )
    cure = (
        f"have {address} exempted from TLS inspection (or corrected, if another server answers "
        "there); no other authority is ever accepted"
    )
    return Finding("TLS", False, said, "network", cure)


def _wrong_of_ours(code: int, shown: x509.Certificate, host: Host) -> tuple[str, str]:
    if code in EXPIRED:
        first, last = shown.not_valid_before_utc, shown.not_valid_after_utc
        return (
            f"the coordinator's certificate is valid from {first:%Y-%m-%d} to {last:%Y-%m-%d} only",
            "check this machine's date; if it is right, the coordinator has to renew it",
        )
    if code in WRONG_HOST:
        return (
            f"the coordinator's certificate is not for {host.name}",
            "ask the coordinator for the name in it, or for one that is for this name",
        )
    return "the coordinator's certificate does not hold", "ask the coordinator to issue it anew"


def _is_issued_by(shown: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        shown.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def _trusted(found: x509.Certificate, version: str) -> Finding:
    from datetime import UTC, datetime

    days = (found.not_valid_after_utc - datetime.now(UTC)).days
    said = f"{version}, by the consortium's authority; valid for {several(days, 'day')} more"
    is_lasting = True if days >= DAYS_LEFT else None
    cure = "the coordinator has to renew its certificate soon"
    return Finding("TLS", is_lasting, said, "server", cure, {"days_left": days})


def _unopened(error: Exception, case: Case) -> Finding:
    """Say why there is no connection, and who can change that."""
    address = case.config.link.address
    if isinstance(error, socket.gaierror | UnicodeError):
        return _not_tried("port", "without the name")
    if isinstance(error, ProxyError):
        said, cure = PROXIED.get(error.status, PROXIED[0])
        text = f"{said} (answer {error.status})" if error.status else said
        return Finding("port", False, text, "network", cure.format(address=address))
    if proxy_for(host_of(address), getproxies_environment()) is not None:
        cure = "check https_proxy, and that the proxy runs"
        return Finding("port", False, "the proxy cannot be reached", "network", cure)
    if isinstance(error, ConnectionRefusedError):
        said = f"{address} refuses connections: nothing listens there"
        cure = "ask whether the coordinator is running, and compare the port in link.address"
        return Finding("port", False, said, "server", cure)
    silent = isinstance(error, TimeoutError)
    said = f"{address} " + (
        f"does not answer within {CONNECT_S:g} s" if silent else "cannot be reached from here"
    )
    cure = f"open outbound TCP to {address} in the firewall; if a proxy is needed, set https_proxy"
    return Finding("port", False, said, "network", cure)


#: What a proxy's refusal means, and its cure.
PROXIED: dict[int, tuple[str, str]] = {
    407: (
        "the proxy asks for a password",
        "write it into https_proxy, as http://user:password@proxy:port, or have this machine let "
        "through without one",
    ),
    403: ("the proxy forbids the connection", "have the proxy let CONNECT to {address} through"),
    0: (
        "the proxy does not open a way",
        "have the proxy let CONNECT to {address} through, and check that it can reach it",
    ),
}


def _superlink(known: object, case: Case) -> Finding:
    status, trip = getattr(known, "status", 0), getattr(known, "round_trip_s", 0.0)
    figures = {"status": status, "round_trip_s": round(trip, 4)}
    if getattr(known, "is_enrolled", False):
        said = f"knows this site's key; a round trip takes {duration(trip)}"
        return Finding("SuperLink", True, said, "server", figures=figures)
    said, cure = ANSWERS.get(
        status,
        (
            "answers something else than a SuperLink would",
            "check link.address with the coordinator",
        ),
    )
    if status == 401 and abs(case.skew_s or 0.0) <= DRIFT_S:
        cure = "the clocks agree; ask the coordinator whether this site's node key is the one known"
    return Finding("SuperLink", False, f"{said} (answer {status})", "server", cure, figures)


#: What the SuperLink's answers to a knock mean, and their cures.
ANSWERS: dict[int, tuple[str, str]] = {
    412: (
        "this site's node key is not admitted yet",
        "run consilia-site join with an invite; if it has joined, ask the coordinator",
    ),
    401: ("this site's signature is refused", "put the clock right first, then try again"),
    404: (
        "what answers there is no SuperLink",
        "check link.address: it is the fleet address, not the one of the control plane",
    ),
    502: ("a gateway answers, the SuperLink behind it does not", "ask whether it is running"),
    503: ("the SuperLink is not ready", "ask whether the coordinator has just been started"),
    504: ("a gateway answers, the SuperLink behind it does not", "ask whether it is running"),
}


def _not_tried(what: str, why: str) -> Finding:
    return Finding(what, None, f"not tried {why}", "network")
