"""Check `RAY_ADDRESS` and its cluster within seconds, before anything starts."""

import os
import re
import socket

VARIABLE = "RAY_ADDRESS"
_PATIENCE_S = 5.0
_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.%]+)\]|(?P<host>[^:/\s\[\]]+)):(?P<port>\d{1,5})")
# Asked of the cluster's head without a token: any answer but that it knows no such call will do.
_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CURE = "give host:port of the head's GCS (6379 by default), auto for a cluster on this machine, or unset it"


def cluster_address() -> str:
    """Return the value of `RAY_ADDRESS`; "" means a private cluster."""
    address = os.environ.get(VARIABLE, "")
    return "" if address == "local" else address


def check_address() -> None:
    """Refuse a cluster that cannot be joined.

    Raises:
        ValueError: it cannot be joined; the message names variable, value and cure.
    """
    address = cluster_address()
    if not address:
        return
    said = f"{VARIABLE} is {address}"
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"{said}, where jobs are submitted: use `ray job submit --address {address} --working-dir . -- "
            f"python workflow.py ...`, or {_CURE}"
        )
    if "://" in address:
        raise ValueError(
            f"{said}, a connection through a proxy (Ray Client), which Ray Train does not support: submit "
            f"the workflow with `ray job submit`, or {_CURE}"
        )
    if address == "auto":
        address = _found_here()
        said += f", which found {address}"
    found = _HOST_PORT.fullmatch(address)
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise ValueError(f"{said}, which is no address: {_CURE}")
    host, port = found["v6"] or found["host"], int(found["port"])
    why = _why_no_cluster(host, port)
    if why:
        raise ValueError(f"{said}, where {why}: start the cluster, or {_CURE}")


def _found_here() -> str:
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address("auto") or ""
    except ConnectionError as error:
        raise ValueError(
            f"{VARIABLE} is auto and no Ray cluster runs on this machine: start one with `ray start --head`, "
            f"or {_CURE}"
        ) from error


def _why_no_cluster(host: str, port: int) -> str:
    """Return why no cluster can be joined at an address; "" if its head answers."""
    try:
        socket.create_connection((host, port), timeout=_PATIENCE_S).close()
    except OSError as error:
        return f"nothing answers ({error.strerror or error})"
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return ""
    import grpc

    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_CALL)(b"", timeout=_PATIENCE_S)
        except grpc.RpcError as error:
            code = error.code()
            unknown = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)
            if code in (*unknown, grpc.StatusCode.DEADLINE_EXCEEDED):
                return f"something answers that is no Ray head ({code.name})"
    return ""
