"""A long run of everything at once: texts, images, videos, clients that leave, bad input. Is the server as it was?

Greedy answers to known questions are compared with those from the beginning, so that an answer that went to the wrong
client is noticed. Memory is compared between the second quarter of the run and the last; descriptors before the clients
come and after they have gone, since those in between are connections that clients keep.

python benchmarks/serving/soak_server.py --minutes 60
python benchmarks/serving/soak_server.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import httpx
import numpy as np
import psutil
from bench_result import claim, write_result
from served import NAME, ask, body, build, client

from nvila_platform.serving import RunningServer, start_server

_WORKERS = 8
_KNOWN = 12
_TOKENS = 16
_MEMORY_GOAL = 1.05
# Until the server has taken note that clients have gone.
_GONE_S = 5.0
_BAD: tuple[bytes, ...] = (b"{", b'{"model": "other", "messages": []}', b"[" * 10_000, b"\xff\xfe")


def main() -> int:
    """Run, print the figures, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a minute, nothing written")
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    seconds = 30.0 if args.quick else args.minutes * 60
    with tempfile.TemporaryDirectory(prefix="nvila-soak-") as folder:
        model, scratch = Path(folder) / "model", Path(folder) / "tmp"
        scratch.mkdir()
        build(model, small=True)
        env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
        with start_server(model, NAME, env=env, args=("--max-requests", "16"), timeout_s=400.0) as server:
            done = asyncio.run(_soak(server, seconds))
            left = len(list(scratch.iterdir()))
    samples = done["samples"]
    quarter = len(samples) // 4
    growth = median(one["rss_mib"] for one in samples[-quarter:]) / median(
        one["rss_mib"] for one in samples[quarter : 2 * quarter]
    )
    before, after = done["descriptors"]
    files = after - before
    print(done["outcomes"], f"memory x{growth:.3f}, descriptors {files:+d}, files left {left}, wrong {done['wrong']}")
    if args.quick:
        return 0
    how = f"{seconds / 60:g} minutes, {sum(done['outcomes'].values())} requests of {_WORKERS} clients"
    claims = [
        claim(
            "memory",
            "memory in the last quarter over the second",
            [growth],
            "at most 1.05",
            growth <= _MEMORY_GOAL,
            how,
        ),
        claim("descriptors", "descriptors after the clients have gone more than before", [files], "0", files <= 0, how),
        claim("files", "temporary files left behind", [left], "0", left == 0, how),
        claim(
            "mixed-up", "answers that are not those of their question", [done["wrong"]], "0", done["wrong"] == 0, how
        ),
    ]
    print(f"written: {write_result('serving-soak', claims, done)}")
    return 0


async def _soak(server: RunningServer, seconds: float) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    wrong = 0
    process = psutil.Process(server.pid)
    async with client(server.base_url) as http:
        # All decoders and threads are there.
        for kind in ("image", "video"):
            await _other(http, kind, random.Random(0))
    await asyncio.sleep(_GONE_S)
    before = process.num_fds()
    async with client(server.base_url) as http:
        known = [body(number, _TOKENS, image=bool(number % 2)) | {"temperature": 0.0} for number in range(_KNOWN)]
        answers = [(await ask(http, one)).text for one in known]
        until = time.monotonic() + seconds

        async def worker(number: int) -> None:
            nonlocal wrong
            draw = random.Random(number)
            while time.monotonic() < until:
                kind = draw.choice(("known", "known", "image", "video", "leave", "bad", "broken"))
                try:
                    if kind == "known":
                        which = draw.randrange(_KNOWN)
                        seen = await ask(http, known[which])
                        wrong += seen.status == 200 and seen.text != answers[which]
                        outcomes[f"known {seen.status}"] += 1
                    else:
                        outcomes[f"{kind} {await _other(http, kind, draw)}"] += 1
                except httpx.HTTPError as e:
                    outcomes[type(e).__name__] += 1

        watcher = asyncio.create_task(_watch(server.pid, seconds))
        await asyncio.gather(*(worker(number) for number in range(_WORKERS)))
        samples = await watcher
    await asyncio.sleep(_GONE_S)
    descriptors = [before, process.num_fds()]
    return {"outcomes": dict(sorted(outcomes.items())), "wrong": wrong, "samples": samples, "descriptors": descriptors}


async def _other(http: httpx.AsyncClient, kind: str, draw: random.Random) -> str:
    if kind == "bad":
        answer = await http.post(
            "/openai/v1/chat/completions", content=draw.choice(_BAD), headers={"content-type": "application/json"}
        )
        return str(answer.status_code)
    if kind == "leave":
        try:
            async with asyncio.timeout(draw.uniform(0.0, 0.1)):
                await ask(http, body(draw.randrange(10**6), 200, image=True))
        except TimeoutError:
            return "left"
        return "answered"
    request = body(draw.randrange(10**6), _TOKENS, image=kind != "video")
    content = request["messages"][0]["content"]
    if kind == "video":
        content.insert(0, {"type": "video_url", "video_url": {"url": _clip(draw.randrange(255)), "num_frames": 4}})
    if kind == "broken":
        content[0]["image_url"]["url"] = content[0]["image_url"]["url"][:-80]
    return str((await ask(http, request)).status)


def _clip(shade: int) -> str:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            pixels = np.full((48, 64, 3), (shade + number) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return f"data:video/mp4;base64,{base64.b64encode(out.getvalue()).decode()}"


async def _watch(pid: int, seconds: float) -> list[dict[str, float]]:
    process = psutil.Process(pid)
    samples = []
    for _ in range(40):
        await asyncio.sleep(seconds / 40)
        family = [process, *process.children(recursive=True)]
        samples.append(
            {
                "rss_mib": round(sum(one.memory_info().rss for one in family) / 2**20, 1),
                "descriptors": process.num_fds(),
                "processes": len(family),
            }
        )
    return samples


if __name__ == "__main__":
    sys.exit(main())
