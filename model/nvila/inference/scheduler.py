"""Who gets into the next step: running answers first, then as much of the waiting prompts as the step has room for.

The scheduler knows blocks and counts, no tensors.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass

from nvila.errors import OverloadedError
from nvila.inference.blocks import BlockPool
from nvila.inference.config import EngineConfig
from nvila.inference.request import Request


@dataclass(frozen=True, slots=True)
class Work:
    """New tokens of one request for the next step, from its `computed` on."""

    request: Request
    length: int


class Scheduler:
    """Requests that wait and those that run.

    A request runs when it holds blocks. When blocks run out, the request that came last gives its own back and waits
    again, in front; its tokens so far are then computed once more.

    Args:
        config: Bounds.
        pool: The blocks.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self._config = config
        self._pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> Request | None:
        """Let a request wait.

        Returns:
            A request that was shed for it, if there was no room and the policy is to shed the oldest.

        Raises:
            OverloadedError: Too many wait already, and the policy is to refuse the newest.
        """
        shed = None
        # A place that a running request would leave free does not count: those that start now are the first to wait.
        if len(self.waiting) >= self._config.max_waiting + max(0, self._config.max_running - len(self.running)):
            if self._config.shed == "newest" or not self.waiting:
                raise OverloadedError(f"{len(self.waiting)} requests wait already", "try again later")
            shed = self.waiting.popleft()
        self.waiting.append(request)
        return shed

    def remove(self, request: Request, *, spoiled: bool = False) -> None:
        """Forget a request and free its blocks at once; `spoiled` erases what it wrote."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request, spoiled=spoiled)

    def plan(self) -> list[Work]:
        """Choose the next step's tokens and hand out the blocks that they need."""
        work: list[Work] = []
        room = self._config.step_tokens
        for request in list(self.running):
            # One that gave way to an earlier one, or whose media are still with the tower.
            if request not in self.running or request.needs_media():
                continue
            length = 1 if request.pending == 1 else min(request.pending, room)
            if length and self._grow(request, length):
                work.append(Work(request, length))
                room -= length if request.pending > 1 else 0
        while room > 0 and self.waiting and len(self.running) < self._config.max_running:
            request = self.waiting[0]
            if not self._admit(request):
                break
            self.waiting.popleft()
            bisect.insort(self.running, request, key=lambda one: one.number)
            length = min(request.pending, room)
            if not self._grow(request, length):
                break
            if not request.needs_media():
                work.append(Work(request, length))
                room -= length
        return work

    def computed(self, work: Work) -> None:
        """Note that a step has computed the keys and values of its tokens."""
        request = work.request
        request.computed += work.length
        if self._config.prefix_reuse:
            size = self._pool.block_size
            for number in range((request.computed - work.length) // size, request.computed // size):
                self._pool.name(request.blocks[number], request.chain(size)[number])

    def _admit(self, request: Request) -> bool:
        """Take over known blocks, if the rest of the tokens fits as well."""
        if self._config.prefix_reuse:
            size = self._pool.block_size
            # The last token is always computed: somebody must make the logits of the next one.
            request.blocks = self._pool.share(request.chain(size)[: (len(request.ids) - 1) // size])
            request.computed = len(request.blocks) * size
        if self._pool.blocks_for(len(request.ids)) - len(request.blocks) > self._pool.num_free:
            self._release(request)
            return False
        if not request.answer_ids:
            request.usage.cached_tokens = request.computed
        return True

    def _grow(self, request: Request, length: int) -> bool:
        """Get the blocks for `length` more tokens, from those who came later if need be."""
        missing = self._pool.blocks_for(request.computed + length) - len(request.blocks)
        while (blocks := self._pool.take(max(0, missing))) is None:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        request.blocks += blocks
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _release(self, request: Request, *, spoiled: bool = False) -> None:
        self._pool.give_back(request.blocks, spoiled=spoiled)
        request.blocks, request.computed = [], 0
