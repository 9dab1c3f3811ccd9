# syntax=docker/dockerfile:1.7
# A node with the transformers engine in the interpreter of llem-ray itself.
#   docker build -f docker/transformers.Dockerfile -t llem-ray:transformers .

# The node: Python, Ray and llem-ray, the same in every image. Ray wants the same Python on all nodes, to the patch level.
FROM python:3.12.12-slim-bookworm AS node
ARG UV_VERSION=0.13.9
ARG NODE_PYTHON=3.12.16
ENV UV_PYTHON_INSTALL_DIR=/opt/python UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY llem_ray llem_ray
COPY constraints/transformers.txt constraints.txt
RUN --mount=type=cache,target=/root/.cache \
    pip install --no-cache-dir "uv==${UV_VERSION}" \
    && uv build --wheel --out-dir /wheels \
    && uv python install "${NODE_PYTHON}" \
    && uv venv --python-preference only-managed --python "${NODE_PYTHON}" /opt/llem-ray \
    && uv pip install --python /opt/llem-ray/bin/python --constraints constraints.txt \
        "llem-ray[codecarbon] @ $(ls /wheels/*.whl)"

FROM debian:12.12-slim
# gcc: torch.compile and Triton build small programs while they run. Debian keeps one version of a package: a pin would break.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 llem \
    && useradd --uid 10001 --gid 10001 --create-home llem \
    && install -d -o llem -g llem /results /models
COPY --from=node /opt/python /opt/python
COPY --from=node /opt/llem-ray /opt/llem-ray
RUN --mount=type=cache,target=/root/.cache \
    --mount=type=bind,from=node,source=/wheels,target=/wheels \
    --mount=type=bind,from=node,source=/usr/local/bin/uv,target=/usr/local/bin/uv \
    --mount=type=bind,source=constraints/transformers.txt,target=/constraints.txt \
    uv pip install --compile-bytecode --python /opt/llem-ray/bin/python --constraints /constraints.txt \
    "llem-ray[transformers] @ $(ls /wheels/*.whl)" \
    && printf '#!/bin/sh\nexec /opt/llem-ray/bin/python "$@"\n' > /usr/local/bin/engine-python \
    && chmod 755 /usr/local/bin/engine-python
COPY --chmod=755 docker/start-node /usr/local/bin/start-node

# Without these the container runtime gives no driver libraries; `utility` is NVML, by which energy is measured.
ENV PATH=/opt/llem-ray/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    LLEM_RAY_RESULTS=/results \
    HF_HOME=/models
ARG LLEM_RAY_VERSION=unknown
LABEL org.opencontainers.image.title="llem-ray, transformers" \
      org.opencontainers.image.description="Measures what LLM inference costs in energy across a whole cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${LLEM_RAY_VERSION}" \
      io.llem-ray.engine="transformers"
USER 10001:10001
WORKDIR /home/llem
# One grep a minute: a check that starts Python would show in the energy of an idle node.
HEALTHCHECK --interval=60s --timeout=5s --start-period=60s --start-interval=5s --retries=3 \
    CMD ["sh", "-c", "grep -qsx raylet /proc/[0-9]*/comm"]
ENTRYPOINT ["start-node"]
CMD ["worker"]
