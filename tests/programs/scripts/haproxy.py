"""HAProxy in front of the server, asking for its health as load balancers do."""

import re
import subprocess
from pathlib import Path

from checks import URL, free_port, running, tell
from proxies import check_proxy

shown = subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=True).stdout
tell(version=re.search(r"version (\d[\d.]*)", shown)[1])
port = free_port()
config = Path.cwd() / "haproxy.cfg"
config.write_text(f"""
global
  maxconn 200
defaults
  mode http
  timeout connect 5s
  timeout client 300s
  timeout server 300s
  timeout http-keep-alive 300s
frontend here
  bind 127.0.0.1:{port}
  default_backend banded
backend banded
  http-reuse always
  option httpchk GET /health
  server one {URL.removeprefix("http://")} check inter 1s
""")
with running(["haproxy", "-db", "-f", str(config)], port):
    check_proxy(f"http://127.0.0.1:{port}")
