"""vLLM's and SGLang's routers in front of the server."""

import sys
from importlib.metadata import PackageNotFoundError, version

from checks import URL, free_port, running, tell
from proxies import check_proxy


def installed():
    """The router's package and the module that starts it."""
    for package, module in (("vllm-router", "vllm_router.launch_router"), ("sglang-router", "sglang_router.launch_router")):
        try:
            return version(package), module
        except PackageNotFoundError:
            pass
    raise RuntimeError("no router is installed")


found, module = installed()
tell(version=found)
port, metrics = free_port(), free_port()
command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", URL]
with running([*command, "--prometheus-port", str(metrics)], port):
    check_proxy(f"http://127.0.0.1:{port}")
