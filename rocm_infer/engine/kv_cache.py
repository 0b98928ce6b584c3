# SPDX-License-Identifier: Apache-2.0
"""Who owns which page of the KV cache, and which prefixes can be reused. Integers only; the tensors are the runner's.

A page holds the K/V of `page_size` consecutive tokens. At any time a page is exactly one of
    free      in `free_pages`
    cached    in the prefix index: a tree with one node per full page, whose edge is the page's tokens
    owned     by one running request, which writes it
A running request holds a path of the tree (every node on it counts the request in `refs`) followed by pages it owns. Nodes
with no refs are evictable. They wait in `unlocked`, least recently used first and children before parents: a request lets go
of its path from the end, and whoever holds a child holds its parents. So the first of `unlocked` is always a leaf, and every
operation costs a constant per page it touches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from rocm_infer.engine.request import Request

Key = tuple[int | str, ...]


class Node:
    """One cached page. `key` is the edge from the parent, `refs` the number of running requests whose path it is on."""

    __slots__ = ("children", "key", "page", "parent", "refs")

    def __init__(self, key: Key, page: int, parent: Node | None, refs: int) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.refs = refs
        self.children: dict[Key, Node] = {}


class KVCache:
    """The page pool and the prefix index of one engine."""

    def __init__(self, num_pages: int, page_size: int, enable_prefix_cache: bool = True) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.enable_prefix_cache = enable_prefix_cache
        self.free_pages = list(range(num_pages - 1, -1, -1))
        self.root = Node((), -1, None, 1)
        self.unlocked: OrderedDict[Node, None] = OrderedDict()
        self.num_cached = 0  # nodes in the tree

    @property
    def num_available(self) -> int:
        """Pages that `extend` can hand out: free ones and evictable ones."""
        return len(self.free_pages) + len(self.unlocked)

    def key(self, request: Request, index: int) -> Key:
        """The edge of a request's page `index`: its tokens, and at the root the salt that keeps tenants apart."""
        start = index * self.page_size
        tokens = tuple(request.tokens[start : start + self.page_size])
        return (request.salt, *tokens) if request.salt and index == 0 else tokens

    def match(self, request: Request) -> list[Node]:
        """The longest cached path of a waiting request's tokens. The last token never matches: one must be computed."""
        path: list[Node] = []
        if self.enable_prefix_cache and not request.needs_prompt_logprobs:
            node = self.root
            for index in range((len(request.tokens) - 1) // self.page_size):
                child = node.children.get(self.key(request, index))
                if child is None:
                    break
                path.append(child)
                node = child
        return path

    def lock(self, request: Request, path: list[Node]) -> None:
        """Give a matched path to a request that holds nothing."""
        for node in path:
            self._lock(node)
        request.pages = [node.page for node in path]
        request.node = path[-1] if path else self.root
        request.num_shared = len(path)
        request.num_computed = len(path) * self.page_size

    def extend(self, request: Request, num_pages: int) -> bool:
        """Give the request pages of its own until it holds `num_pages`, evicting if need be; False (and nothing) if too few."""
        missing = num_pages - len(request.pages)
        if missing > self.num_available:
            return False
        for _ in range(missing):
            if not self.free_pages:
                self._evict()
            request.pages.append(self.free_pages.pop())
        return True

    def insert(self, request: Request) -> None:
        """Move the request's full computed pages into the index; it keeps holding them.

        Where another request has cached the same tokens first, this one changes over to that page and frees its own.
        """
        if not self.enable_prefix_cache:
            return
        node = request.node
        assert node is not None
        for index in range(request.num_shared, request.num_computed // self.page_size):
            key = self.key(request, index)
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(key, request.pages[index], node, 1)
                self.num_cached += 1
            else:
                self._lock(child)
                self.free_pages.append(request.pages[index])
                request.pages[index] = child.page
                request.num_tabled = min(request.num_tabled, index)
            node = child
            request.num_shared += 1
        request.node = node

    def release(self, request: Request) -> None:
        """Take back everything a request holds. What it had inserted stays cached."""
        self.free_pages.extend(reversed(request.pages[request.num_shared :]))
        node = request.node
        while node is not None and node is not self.root:
            node.refs -= 1
            if node.refs == 0:
                self.unlocked[node] = None
            node = node.parent
        request.pages = []
        request.node = None
        request.num_shared = request.num_computed = request.num_tabled = 0

    def forget(self, request: Request) -> None:
        """`release`, and drop from the index what nobody else uses of it: its K/V are not to be trusted."""
        node = request.node
        self.release(request)
        while node is not None and node.parent is not None and node.refs == 0 and not node.children:
            del self.unlocked[node]
            self._drop(node)
            node = node.parent

    def flush(self) -> int:
        """Drop every cached page that no running request holds; returns their number."""
        num_pages = len(self.unlocked)
        while self.unlocked:
            self._evict()
        return num_pages

    def check(self, running: Iterable[Request]) -> None:
        """Audit the books against the running requests. Raises AssertionError naming the first discrepancy."""
        owned: list[int] = []
        refs: dict[Node, int] = {}
        for request in running:
            owned += request.pages[request.num_shared :]
            path = self._path(request)
            assert [node.page for node in path] == request.pages[: request.num_shared], f"{request.rid}: path and pages differ"
            for node in path:
                refs[node] = refs.get(node, 0) + 1
        nodes = self._nodes()
        pages = sorted(self.free_pages + owned + [node.page for node in nodes])
        assert pages == list(range(self.num_pages)), "a page is lost or has two owners"
        assert len(nodes) == self.num_cached, f"{len(nodes)} nodes, counted {self.num_cached}"
        for node in nodes:
            assert node.refs == refs.pop(node, 0), f"page {node.page}: wrong reference count {node.refs}"
            assert (node.refs == 0) == (node in self.unlocked), f"page {node.page}: refs {node.refs}, wrongly (un)locked"
        assert not refs, "a request holds a node that is not in the tree"
        seen: set[Node] = set()
        for node in self.unlocked:
            assert seen.issuperset(node.children.values()), f"page {node.page}: would be evicted before its children"
            seen.add(node)

    def _path(self, request: Request) -> list[Node]:
        path: list[Node] = []
        node = request.node
        while node is not None and node is not self.root:
            path.append(node)
            node = node.parent
        return path[::-1]

    def _nodes(self) -> list[Node]:
        nodes = list(self.root.children.values())
        for node in nodes:
            nodes.extend(node.children.values())
        return nodes

    def _lock(self, node: Node) -> None:
        if node.refs == 0:
            del self.unlocked[node]
        node.refs += 1

    def _evict(self) -> None:
        node, _ = self.unlocked.popitem(last=False)
        self._drop(node)

    def _drop(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.key]
        self.num_cached -= 1
        self.free_pages.append(node.page)
