"""What there is to rent on loopback, and what Lambda's OpenAPI document 1.10.0 allows to ask.

The live service was never asked. `objections` may be stricter than it is: a field that the document does not
know is a mistake here.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

REGIONS = {"us-east-1": "Virginia, USA", "us-west-1": "California, USA", "us-east-3": "Washington, USA"}
FAMILIES = {"lambda-stack-22-04": "x86_64", "lambda-stack-24-04": "x86_64", "lambda-stack-24-04-arm": "arm64"}
FILE_SYSTEMS = {"datasets": "us-east-1", "archive": "us-west-1"}
TYPES = {  # GPU, cents an hour, vCPUs, GiB of memory, GiB of disk, GPUs, where there are some
    "gpu_8x_a100_80gb_sxm4": ("A100 (80 GB SXM4)", 1432, 240, 1800, 20480, 8, ["us-west-1"]),
    "gpu_1x_gh200": ("GH200 (96 GB)", 149, 64, 432, 4096, 1, ["us-east-3"]),
    "gpu_1x_a10": ("A10 (24 GB PCIe)", 75, 30, 200, 1400, 1, ["us-east-1", "us-west-1"]),
    "gpu_1x_a100_sxm4": ("A100 (40 GB SXM4)", 129, 30, 200, 512, 1, ["us-east-1"]),
    "gpu_1x_rtx6000": ("RTX 6000 (24 GB)", 50, 14, 46, 512, 1, []),
    "cpu_4x_general": ("N/A", 8, 4, 16, 256, 0, ["us-east-1"]),
}


def region_json(name: str) -> dict:
    return {"name": name, "description": REGIONS[name]}


def type_json(name: str) -> dict:
    gpu, cents, vcpus, memory, storage, gpus, _ = TYPES[name]
    return {
        "name": name,
        "description": f"{gpus}x {gpu}",
        "gpu_description": gpu,
        "price_cents_per_hour": cents,
        "specs": {"vcpus": vcpus, "memory_gib": memory, "storage_gib": storage, "gpus": gpus},
    }


def image_json(family: str, region: str) -> dict:
    return {
        "id": f"{family}-{region}",
        "name": family,
        "family": family,
        "version": "1.0",
        "architecture": FAMILIES[family],
        "region": region_json(region),
    }


def file_system_json(name: str) -> dict:
    where = f"/lambda/nfs/{name}"
    return {"id": f"{name}-id", "name": name, "mount_point": where, "region": region_json(FILE_SYSTEMS[name])}


IMAGES = [image_json(family, region) for family in FAMILIES for region in REGIONS]

# ------------------------------------------------------------------------------------------------------------
# what may be asked


def is_text(value: Any, longest=math.inf) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest


def is_list(value: Any, fits: Callable[[Any], bool] = is_text) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_image(value: Any) -> bool:
    return is_object(value) and value.keys() in ({"id"}, {"family"}) and is_list([*value.values()])


def is_tag(value: Any) -> bool:
    if not is_object(value) or value.keys() != {"key", "value"}:
        return False
    key, text = value["key"], value["value"]
    return (
        is_text(key, 55)
        and bool(re.fullmatch("[a-z][a-z0-9-:]+", key))
        and (text == "" or is_text(text, 128))
    )


LAUNCH = {  # field: whether a value fits
    "region_name": is_text,
    "instance_type_name": is_text,
    "ssh_key_names": lambda value: is_list(value) and len(value) == 1,
    "name": lambda value: is_text(value, 64),
    "hostname": lambda value: is_text(value, 63),
    "image": is_image,
    "user_data": lambda value: is_text(value, 1 << 20),
    "tags": lambda value: is_list(value, is_tag),
    "file_system_names": is_list,
    "file_system_mounts": lambda value: is_list(value, is_object),
    "firewall_rulesets": lambda value: is_list(value, is_object),
}
TERMINATE = {"instance_ids": lambda value: is_list(value) and len(value) > 0}
BODIES = {  # path: its fields, those that must be there
    "/instance-operations/launch": (LAUNCH, {"region_name", "instance_type_name", "ssh_key_names"}),
    "/instance-operations/terminate": (TERMINATE, {"instance_ids"}),
}
QUESTIONS = r"/(instance-types|instances|instances/[^/?]+|ssh-keys|images|file-systems|regions)"


def is_blocked(headers) -> bool:
    """The service turns Python's own User-Agents away."""
    return bool(re.match("python-(requests|urllib)|$", headers.get("User-Agent", ""), re.IGNORECASE))


def objections(method: str, path: str, headers, body: bytes) -> Iterator[str]:
    """What the document does not allow in a request."""
    if is_blocked(headers):
        yield "it needs a User-Agent of its own"
    if not re.match("Bearer |Basic ", headers.get("Authorization", "")):
        yield "no credentials"
    if method == "POST" and path in BODIES:
        yield from wrong_fields(*BODIES[path], headers, body)
    elif method != "GET" or not re.fullmatch(QUESTIONS, path):
        yield "there is no such request"


def wrong_fields(fields: dict, needed: set[str], headers, body: bytes) -> Iterator[str]:
    if headers.get_content_type() != "application/json":
        yield f"the body is said to be {headers.get_content_type()}"
    try:
        given = json.loads(body)
    except ValueError:
        given = None
    if not is_object(given):
        yield "the body is not a JSON object"
        return
    yield from (f"{name} is missing" for name in sorted(needed - given.keys()))
    for name, value in given.items():
        if name not in fields:
            yield f"{name} is not known"
        elif not fields[name](value):
            yield f"{name} may not be {value!r}"


class Rate:
    """At most one request in so many seconds, by when they arrive; two may have come closer by `jitter`."""

    def __init__(self, seconds: float, jitter: float):
        self.seconds, self.jitter = seconds, min(jitter, seconds)
        self.due = -math.inf

    def too_fast(self, now: float) -> bool:
        early = now < self.due - self.jitter
        self.due = max(now, self.due) + self.seconds
        return early
