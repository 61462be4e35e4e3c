"""nginx in front of the server: with no more than `proxy_pass`, and with connections that it keeps."""

import os
import re
import subprocess
from pathlib import Path

from checks import URL, check, free_port, running, tell
from proxies import answer, check_proxy, completion

shown = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
tell(version=re.search(r"nginx/(\S+)", shown)[1])
kept, plain = free_port(), free_port()
server = URL.removeprefix("http://")
here = Path.cwd()
here.joinpath("nginx.conf").write_text(f"""
daemon off;
pid {here}/nginx.pid;
error_log stderr;
{"user root;" if os.geteuid() == 0 else ""}
events {{}}
http {{
  access_log off;
  client_body_temp_path {here}/body;
  proxy_temp_path {here}/proxied;
  fastcgi_temp_path {here}/fastcgi;
  uwsgi_temp_path {here}/uwsgi;
  scgi_temp_path {here}/scgi;
  upstream banded {{ server {server}; keepalive 32; }}
  server {{
    listen 127.0.0.1:{kept};
    location / {{ proxy_pass http://banded; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
  server {{
    listen 127.0.0.1:{plain};
    location / {{ proxy_pass http://{server}; }}
  }}
}}
""")
with running(["nginx", "-c", str(here / "nginx.conf"), "-e", "stderr"], kept):
    check_proxy(f"http://127.0.0.1:{kept}")

    @check("at its defaults, over HTTP/1.0: a completion and a stream")
    def _():
        for stream in (False, True):
            status, text = answer(f"http://127.0.0.1:{plain}", completion(os.environ["BANDED_MODEL"], stream=stream))
            assert status == 200, text
            assert text.endswith("data: [DONE]\n\n") == stream, text[-100:]
