"""Caddy in front of the server, with its check of the server's health."""

import subprocess
from pathlib import Path

from checks import URL, free_port, running, tell
from proxies import check_proxy

tell(version=subprocess.run(["caddy", "version"], capture_output=True, text=True, check=True).stdout.split()[0])
port = free_port()
config = Path.cwd() / "Caddyfile"
config.write_text(f"""
{{
  admin off
  auto_https off
}}
http://127.0.0.1:{port} {{
  reverse_proxy {URL.removeprefix("http://")} {{
    health_uri /health
    health_interval 1s
  }}
}}
""")
with running(["caddy", "run", "--config", str(config), "--adapter", "caddyfile"], port):
    check_proxy(f"http://127.0.0.1:{port}")
