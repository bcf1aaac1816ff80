# The images of Headrace's services, from one wheel. A target per image:
#   docker build --target gateway -t headrace-gateway:0.1.0 .
#   docker build --target router -t headrace-router:0.1.0 .
#   docker build --target batcher -t headrace-batcher:0.1.0 .
#   docker build --target upstream -t headrace-upstream:0.1.0 .
#   docker build --target worker -t headrace-worker:0.1.0 .          (computes on CPUs)
#   docker build --target worker-gpu -t headrace-worker-gpu:0.1.0 .
#   docker build --target worker-vllm -t headrace-worker-vllm:0.1.0 .          (vLLM, on GPUs)
# Packages are installed by hash, from k8s/images/*.txt. The images have no shell and no other program than Python;
# `kubectl debug --image` adds a container with tools to a pod. `make images` builds and tries them.

# The official image python:3.12.15-slim-trixie, by the digest of its index for all platforms. For a newer one:
#   docker buildx imagetools inspect python:3.12-slim-trixie
# There is no tag in the name, because podman and buildah before 2024 refuse a name with both.
ARG PYTHON_IMAGE=docker.io/library/python@sha256:05cda9777409a9c3ffddd94a4c476b79f0769a0b4857f0c7ed9226b6800b0d6f
# vLLM's official image, by tag: pin it by the digest that `docker buildx imagetools inspect` prints for your registry.
# Its Python must be 3.11 or newer; docs/vllm.md lists the tested versions of vLLM.
ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v0.32.0
# More arguments of pip, such as an index; the CPU builds of torch come from this one.
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

FROM ${PYTHON_IMAGE} AS python
# Files that are made here have this time, so that equal sources give equal images.
ENV SOURCE_DATE_EPOCH=315532800 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /build

FROM python AS root
COPY k8s/images/root.py ./
RUN python root.py /root-of-image

FROM python AS wheel
COPY k8s/images/build.txt ./
ARG PIP_ARGS
# hadolint ignore=SC2086
RUN pip install --no-cache-dir --no-deps --no-compile --require-hashes --only-binary=:all: --target tools \
    --requirement build.txt ${PIP_ARGS}
COPY pyproject.toml README.md LICENSE src/
COPY services src/services
RUN PYTHONPATH=/build/tools pip wheel --no-cache-dir --no-deps --no-build-isolation --no-index --wheel-dir dist ./src

FROM python AS packages
# `strip` removes symbols for debuggers.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
COPY k8s/images/packages.py k8s/images/sbom.py ./
COPY --from=root /root-of-image/var/lib/dpkg /root-of-image/var/lib/dpkg
COPY --from=wheel /build/dist dist

FROM packages AS gateway-packages
COPY k8s/images/gateway.txt ./
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python packages.py gateway.txt dist/*.whl gateway ${PIP_ARGS} \
 && python sbom.py gateway /root-of-image /opt/headrace/packages /opt/headrace/app > /opt/headrace/app/sbom.cdx.json

FROM packages AS router-packages
COPY k8s/images/router.txt ./
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python packages.py router.txt dist/*.whl router ${PIP_ARGS} \
 && python sbom.py router /root-of-image /opt/headrace/packages /opt/headrace/app > /opt/headrace/app/sbom.cdx.json

FROM packages AS batcher-packages
COPY k8s/images/batcher.txt ./
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python packages.py batcher.txt dist/*.whl batcher ${PIP_ARGS} \
 && python sbom.py batcher /root-of-image /opt/headrace/packages /opt/headrace/app > /opt/headrace/app/sbom.cdx.json

FROM packages AS upstream-packages
COPY k8s/images/upstream.txt ./
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python packages.py upstream.txt dist/*.whl upstream ${PIP_ARGS} \
 && python sbom.py upstream /root-of-image /opt/headrace/packages /opt/headrace/app > /opt/headrace/app/sbom.cdx.json

FROM packages AS worker-packages
COPY k8s/images/worker.txt ./
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python packages.py worker.txt dist/*.whl worker ${PIP_ARGS} \
 && python sbom.py worker /root-of-image /opt/headrace/packages /opt/headrace/app > /opt/headrace/app/sbom.cdx.json

FROM packages AS worker-gpu-packages
COPY k8s/images/worker-gpu.txt ./
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python packages.py worker-gpu.txt dist/*.whl worker-gpu ${PIP_ARGS} \
 && python sbom.py worker-gpu / /opt/headrace/packages /opt/headrace/app > /opt/headrace/app/sbom.cdx.json

FROM scratch AS service
COPY --from=root /root-of-image/ /
ENV PATH=/usr/local/bin:/usr/bin \
    PYTHONPATH=/opt/headrace/app:/opt/headrace/packages \
    PYTHONUNBUFFERED=1 \
    PYTHONPYCACHEPREFIX=/opt/headrace/bytecode \
    PYTHONDONTWRITEBYTECODE=1 \
    LANG=C.UTF-8 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    HOME=/tmp \
    HEADRACE_HOST=0.0.0.0 \
    HEADRACE_CACHE=/var/cache/headrace
ARG REVISION=unknown
LABEL org.opencontainers.image.vendor="Headrace" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

FROM service AS gateway
LABEL org.opencontainers.image.title="headrace-gateway" \
      org.opencontainers.image.description="Headrace's gateway: it serves OpenAI's API in front of a router."
COPY --from=gateway-packages /opt/headrace/packages /opt/headrace/packages
COPY --from=gateway-packages /opt/headrace/bytecode /opt/headrace/bytecode
COPY --from=gateway-packages /opt/headrace/app /opt/headrace/app
EXPOSE 8080
ENTRYPOINT ["python", "-m", "headrace.gateway"]

FROM service AS router
LABEL org.opencontainers.image.title="headrace-router" \
      org.opencontainers.image.description="Headrace's router: it picks the smallest tier that answers well."
COPY --from=router-packages /opt/headrace/packages /opt/headrace/packages
COPY --from=router-packages /opt/headrace/bytecode /opt/headrace/bytecode
COPY --from=router-packages /opt/headrace/app /opt/headrace/app
EXPOSE 50051
ENTRYPOINT ["python", "-m", "headrace.router"]

FROM service AS batcher
LABEL org.opencontainers.image.title="headrace-batcher" \
      org.opencontainers.image.description="Headrace's batcher: it combines the requests of a tier into batches."
COPY --from=batcher-packages /opt/headrace/packages /opt/headrace/packages
COPY --from=batcher-packages /opt/headrace/bytecode /opt/headrace/bytecode
COPY --from=batcher-packages /opt/headrace/app /opt/headrace/app
EXPOSE 50052
ENTRYPOINT ["python", "-m", "headrace.batcher"]

FROM service AS upstream
LABEL org.opencontainers.image.title="headrace-upstream" \
      org.opencontainers.image.description="Headrace's upstream: it asks a service with OpenAI's API for the answers of a tier."
COPY --from=upstream-packages /opt/headrace/packages /opt/headrace/packages
COPY --from=upstream-packages /opt/headrace/bytecode /opt/headrace/bytecode
COPY --from=upstream-packages /opt/headrace/app /opt/headrace/app
EXPOSE 50054
ENTRYPOINT ["python", "-m", "headrace.upstream"]

FROM service AS worker
LABEL org.opencontainers.image.title="headrace-worker" \
      org.opencontainers.image.description="Headrace's worker: it computes with one model on CPUs."
COPY --from=worker-packages /opt/headrace/packages /opt/headrace/packages
COPY --from=worker-packages /opt/headrace/bytecode /opt/headrace/bytecode
COPY --from=worker-packages /opt/headrace/app /opt/headrace/app
EXPOSE 50053
ENTRYPOINT ["python", "-m", "headrace.worker"]

# On the base image itself: Triton compiles what launches its kernels with the C compiler, when a worker starts.
FROM python AS worker-gpu
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 headrace && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home headrace \
 && install -d -o headrace -g headrace /var/cache/headrace
ENV PYTHONPATH=/opt/headrace/app:/opt/headrace/packages \
    PYTHONPYCACHEPREFIX=/opt/headrace/bytecode \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HEADRACE_HOST=0.0.0.0 \
    HEADRACE_CACHE=/var/cache/headrace
ARG REVISION=unknown
LABEL org.opencontainers.image.vendor="Headrace" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.title="headrace-worker-gpu" \
      org.opencontainers.image.description="Headrace's worker: it computes with one model on a GPU."
WORKDIR /tmp
COPY --from=worker-gpu-packages /opt/headrace/packages /opt/headrace/packages
COPY --from=worker-gpu-packages /opt/headrace/bytecode /opt/headrace/bytecode
COPY --from=worker-gpu-packages /opt/headrace/app /opt/headrace/app
USER 10001:10001
EXPOSE 50053
ENTRYPOINT ["python", "-m", "headrace.worker"]

# vLLM with its packages as they are. Those that Headrace needs besides are installed for vLLM's Python: what is there
# already, in a version that Headrace supports, stays.
# hadolint ignore=DL3006
FROM ${VLLM_IMAGE} AS worker-vllm
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    SOURCE_DATE_EPOCH=315532800
WORKDIR /build
COPY k8s/images/worker-vllm.txt k8s/images/vllm_packages.py ./
COPY --from=wheel /build/dist dist
ARG PIP_ARGS
RUN --mount=type=cache,target=/root/.cache/pip python3 vllm_packages.py worker-vllm.txt dist/*.whl ${PIP_ARGS} \
 && rm -rf /build/* \
 && groupadd --gid 10001 headrace && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home headrace \
 && install -d -o headrace -g headrace /var/cache/headrace
ENV PYTHONPATH=/opt/headrace/app:/opt/headrace/packages \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HEADRACE_HOST=0.0.0.0 \
    HEADRACE_CACHE=/var/cache/headrace
ARG REVISION=unknown
LABEL org.opencontainers.image.vendor="Headrace" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.title="headrace-worker-vllm" \
      org.opencontainers.image.description="Headrace's worker: it computes with one model on vLLM."
WORKDIR /tmp
USER 10001:10001
EXPOSE 50053
ENTRYPOINT ["python3", "-m", "headrace.worker", "--engine", "vllm"]
