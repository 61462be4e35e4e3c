# Two images of the same application, built by BuildKit from the repository's root:
#
#   docker build --target cpu --build-arg TORCH_INDEX_URL=<PyTorch's CPU wheel index> --tag banded:cpu .
#   docker build --target cuda --tag banded:cuda .
#
# constraints.txt pins public versions only ("torch==2.13.0"), so one lock serves both: which build of torch an image gets
# is decided by the index its wheel comes from. What runs in them, and how large they are: deploy/README.md.

FROM python:3.11-slim AS requirements
ENV PATH=/opt/banded/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/banded
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The dependencies on their own, so that a change of the source does not install torch again.
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt

FROM requirements AS install-cpu
ARG TORCH_INDEX_URL
# Without an index torch would come from the default one, and an image called cpu would hold gigabytes of CUDA libraries.
RUN test -n "$TORCH_INDEX_URL" || { \
      echo "target cpu: say --build-arg TORCH_INDEX_URL=<PyTorch's CPU wheel index>, or build --target cuda" >&2; exit 1; }
# That index supplies torch and nothing else; everything torch needs comes from the default index like the rest.
RUN pip install --no-deps --index-url "$TORCH_INDEX_URL" --constraint constraints.txt torch
RUN pip install --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN pip install --no-deps .

FROM requirements AS install-cuda
RUN pip install --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN pip install --no-deps .

FROM python:3.11-slim AS runtime
# The home is /tmp because libraries keep caches in the home, and nothing else is writable on a read-only root.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin banded
USER 10001:10001
WORKDIR /tmp
# Loopback inside a container reaches nobody. An outward address needs BANDED_API_KEYS or --allow-unauthenticated: without
# either, `banded serve` says so and ends.
ENV PATH=/opt/banded/bin:$PATH BANDED_HOST=0.0.0.0 BANDED_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
# http.client, because urllib would send the check through a proxy named in the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
health = http.client.HTTPConnection('127.0.0.1', int(os.environ['BANDED_PORT']), timeout=4); \
health.request('GET', '/health/ready'); \
sys.exit(health.getresponse().status != 200)"]
ENTRYPOINT ["banded"]
CMD ["serve"]

# torch's CUDA build; its wheels bring the CUDA libraries, the host its driver. Triton compiles the kernels, and with a C
# compiler their launchers, when they first run; both stay in its cache under the home. This image never ran on a GPU.
FROM runtime AS cuda
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=install-cuda /opt/banded /opt/banded

# g++ for the kernels that the server compiles for the CPU that it runs on.
FROM runtime AS cpu
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=install-cpu /opt/banded /opt/banded
