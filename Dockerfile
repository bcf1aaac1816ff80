# Builds one image per service from one wheel:
#   docker build --build-arg SERVICE=router  -t headrace-router .
#   docker build --build-arg SERVICE=batcher -t headrace-batcher .
#   docker build --build-arg SERVICE=worker  -t headrace-worker .
# PIP_ARGS is passed to pip, for example to select an index with CPU builds of torch.
# PACKAGES are installed with apt. A worker on a GPU needs "gcc libc6-dev": Triton compiles what launches its kernels.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY services services
ARG SERVICE=router
ARG PIP_ARGS=
# The cache mount avoids downloading torch again after a change of the code.
RUN --mount=type=cache,target=/root/.cache/pip python -m venv /opt/headrace \
 && /opt/headrace/bin/pip install ${PIP_ARGS} --constraint constraints.txt ".[${SERVICE}]"

FROM python:${PYTHON}-slim
ARG SERVICE=router
ENV PATH=/opt/headrace/bin:$PATH \
    HEADRACE_SERVICE=headrace.${SERVICE} \
    HEADRACE_HOST=0.0.0.0 \
    HEADRACE_CACHE=/var/cache/headrace \
    PYTHONUNBUFFERED=1
ARG PACKAGES=
RUN if [ -n "${PACKAGES}" ]; then apt-get update && apt-get install -y --no-install-recommends ${PACKAGES} \
 && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --uid 10001 --create-home headrace && install -d -o headrace /var/cache/headrace
COPY --from=build /opt/headrace /opt/headrace
USER 10001
# exec makes the service process 1, so that it receives SIGTERM.
ENTRYPOINT ["/bin/sh", "-c", "exec python -m \"$HEADRACE_SERVICE\" \"$@\"", "headrace"]
