"""One model, many clients: a queue in fair order, and dynamic batches from it.

The model belongs to one thread. When it is free, it takes what is waiting, clients in turn, as one left-padded batch
(any rows make one, see generation_rows.py). Rows leave a batch one by one as they end; new ones wait for the next.
"""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from .conversation import ConversationCache
from .generation_rows import Row, generate_or_split

logger = logging.getLogger(__name__)

GATHERING = 0.01  # seconds in which requests that come together find each other


class QueueFull(Exception):
    """No more requests are taken in."""


class ServingQueue:
    """Generates rows of many clients in one thread.

    Args:
        max_batch: rows of a batch. batch_tokens: rows x (longest prompt + longest answer), at most; one row alone may
            have more.
        max_waiting: rows that wait, of all clients together.
        cache_bytes: for states of conversations, and as much for features of media (see `ConversationCache`); 0: none.
    """

    def __init__(
        self,
        model,
        processor,
        max_batch: int = 8,
        batch_tokens: int = 65_536,
        max_waiting: int = 64,
        prefill_chunk_size: int | None = None,
        cache_bytes: int = 0,
    ):
        self.conversations = ConversationCache(cache_bytes, cache_bytes) if cache_bytes else None
        self.model, self.processor, self.prefill_chunk_size = model, processor, prefill_chunk_size
        self.max_batch, self.batch_tokens, self.max_waiting = max_batch, batch_tokens, max_waiting
        self.clients: OrderedDict[str, deque[tuple[Row, Callable]]] = OrderedDict()
        self.waiting = self.running = self.batches = 0
        self.closed, self.changed = False, threading.Condition()
        self.gone: set[str] = set()  # scopes whose conversations are to be forgotten
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    def submit(self, client: str, row: Row, failed: Callable[[Exception], None]) -> None:
        """Puts a row into its client's queue. Its tokens go to `row.on_token`, or an error to `failed`, in the model's
        thread; a row that `row.stopped()` while it waits is dropped without a word.

        Raises:
            QueueFull: too many wait, or the queue is closed.
        """
        with self.changed:
            if self.closed or self.waiting >= self.max_waiting:
                raise QueueFull
            self.clients.setdefault(client, deque()).append((row, failed))
            self.waiting += 1
            self.changed.notify()

    def forget(self, scope: str) -> None:
        """Drops what is kept of a scope's conversations, as soon as the model is free."""
        with self.changed:
            self.gone.add(scope)
            self.changed.notify()

    def close(self) -> None:
        """Ends the rows that run at their next token and drops those that wait."""
        with self.changed:
            self.closed = True
            self.clients.clear()
            self.waiting = 0
            self.changed.notify()
        self.thread.join()

    def _take(self) -> list[tuple[Row, Callable]]:
        """The next batch, one row of each client in turn; empty when the queue is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.closed or self.gone)
            while self.gone:  # here, because the store belongs to this thread
                scope = self.gone.pop()
                if self.conversations is not None:
                    self.conversations.forget(scope)
            until = time.monotonic() + GATHERING
            while 0 < self.waiting < self.max_batch and (left := until - time.monotonic()) > 0:
                self.changed.wait(left)
            batch, length, new = [], 0, 0
            while self.clients and len(batch) < self.max_batch:
                client, own = next(iter(self.clients.items()))
                row = own[0][0]
                if row.stopped is None or not row.stopped():
                    length, new = max(length, row.prompt_tokens), max(new, row.max_new_tokens)
                    if batch and (len(batch) + 1) * (length + new) > self.batch_tokens:
                        break  # its turn is next, whatever comes
                    batch.append(own[0])
                    self.running = len(batch)
                own.popleft()
                self.waiting -= 1
                self.clients.move_to_end(client)
                if not own:
                    del self.clients[client]
            return batch

    def _run(self) -> None:
        while not self.closed:
            batch = self._take()
            if not batch:
                continue
            rows = [row for row, _ in batch]
            for row in rows:
                row.stopped = self._or_closed(row.stopped)
            self.batches += 1
            try:
                generate_or_split(self.model, self.processor, rows, self.prefill_chunk_size, self.conversations)
            except BaseException as error:  # the thread must outlive whatever happens to a batch
                logger.exception("a batch failed")
                for row in rows:
                    row.error = row.error or RuntimeError(str(error))
            for row, failed in batch:
                if row.error is not None:
                    failed(row.error)
            self.running = 0

    def _or_closed(self, stopped: Callable[[], bool] | None) -> Callable[[], bool]:
        return lambda: self.closed or (stopped is not None and stopped())


__all__ = ["QueueFull", "ServingQueue"]
