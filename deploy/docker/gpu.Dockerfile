# The gateway on NVIDIA GPUs, with the embedded default base. From the repository's root:
#   docker build -f deploy/docker/gpu.Dockerfile -t deltaworks:gpu .
# It needs the NVIDIA container toolkit where it runs; CUDA itself comes with vLLM's wheels.
# Pin the base image to a digest of your registry with --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# g++ compiles the CPU kernel, which makes seeded masks. Debian serves one version at a time, so there is none to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/deltaworks
ENV PATH=/opt/deltaworks/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY deploy/lock deploy/lock
RUN pip install --no-cache-dir --no-deps --require-hashes -r deploy/lock/gpu.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && XDG_CACHE_HOME=/opt/cache python -c "from compressors.base import default_base; default_base(progress=False)"

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="deltaworks" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles the launchers of its kernels with gcc.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 deltaworks \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/deltaworks --create-home --shell /usr/sbin/nologin deltaworks
COPY --from=build /opt/deltaworks /opt/deltaworks
COPY --from=build /opt/cache /opt/cache
# The root file system may be read-only: the store is under HOME, what can be made again under /tmp.
ENV PATH=/opt/deltaworks/bin:$PATH \
    HOME=/var/lib/deltaworks \
    XDG_CACHE_HOME=/opt/cache \
    VLLM_CACHE_ROOT=/tmp/vllm \
    HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    TRITON_CACHE_DIR=/tmp/triton \
    FLASHINFER_WORKSPACE_BASE=/tmp/flashinfer \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    DELTAWORKS__SERVER__HOST=0.0.0.0 \
    DELTAWORKS__SERVER__PORT=8000 \
    DELTAWORKS__SERVER__ADMIN_PORT=8001
USER 10001:10001
WORKDIR /var/lib/deltaworks
VOLUME ["/var/lib/deltaworks"]
# 8000: inference, health, metrics. 8001: the admin plane, which stays closed without a key.
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
ENTRYPOINT ["deltaworks"]
CMD ["serve"]
