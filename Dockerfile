# One image per service from one wheel:
#   docker build --build-arg SERVICE=router  -t headrace-router .
#   docker build --build-arg SERVICE=batcher -t headrace-batcher .
#   docker build --build-arg SERVICE=worker  -t headrace-worker .
# PIP_ARGS reaches pip, for example to choose an index with CPU builds of torch.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY services services
ARG SERVICE=router
ARG PIP_ARGS=
# The cache spares a build after a change of code from fetching torch again.
RUN --mount=type=cache,target=/root/.cache/pip python -m venv /opt/headrace \
 && /opt/headrace/bin/pip install ${PIP_ARGS} --constraint constraints.txt ".[${SERVICE}]"

FROM python:${PYTHON}-slim
ARG SERVICE=router
ENV PATH=/opt/headrace/bin:$PATH \
    HEADRACE_SERVICE=headrace.${SERVICE} \
    HEADRACE_HOST=0.0.0.0 \
    HEADRACE_CACHE=/var/cache/headrace \
    PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --create-home headrace && install -d -o headrace /var/cache/headrace
COPY --from=build /opt/headrace /opt/headrace
USER 10001
# exec: the service is process 1 and gets SIGTERM itself.
ENTRYPOINT ["/bin/sh", "-c", "exec python -m \"$HEADRACE_SERVICE\" \"$@\"", "headrace"]
