"""A file system in memory, flaky://, that fails when it is told to."""

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Flaky(MemoryFileSystem):
    """`faults` is a list of (method, part of the path, exception): each is raised once, in that order of search; an
    exception in `always`, {method: exception}, every time."""

    protocol = "flaky"
    cachable = False
    store, pseudo_dirs = {}, [""]
    faults, always, calls = [], {}, []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.faults, cls.always, cls.calls = [], {}, []

    def _fail(self, method: str, path: str) -> None:
        Flaky.calls.append((method, path))
        if method in Flaky.always:
            raise Flaky.always[method]
        for fault in Flaky.faults:
            if fault[0] == method and fault[1] in path:
                Flaky.faults.remove(fault)
                raise fault[2]

    def cat_file(self, path, *args, **kwargs):
        self._fail("read", path)
        return super().cat_file(path, *args, **kwargs)

    def put_file(self, lpath, rpath, *args, **kwargs):
        self._fail("write", rpath)
        super().put_file(lpath, rpath, *args, **kwargs)

    def pipe_file(self, path, value, *args, **kwargs):
        self._fail("write", path)
        super().pipe_file(path, value, *args, **kwargs)

    def rm(self, path, *args, **kwargs):
        self._fail("remove", path)
        super().rm(path, *args, **kwargs)

    def find(self, path, *args, **kwargs):
        self._fail("list", path)
        return super().find(path, *args, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)
