# One image per role: docker build --target actor|actor-envpool|replay|inference|learner|tensorboard .
# compose.yaml builds them all; docs/operations.md tells how they are run.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS python
ENV PATH=/opt/seedrl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN groupadd --gid 10001 seedrl \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp seedrl \
 && install -d -o seedrl -g seedrl /runs

# --- the code, as a wheel
FROM python AS wheel
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /opt/seedrl && pip install --quiet 'setuptools>=77'
COPY presets presets
COPY shared shared
COPY services services
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

# --- what each role needs, without the code
FROM python AS dependencies
WORKDIR /build
COPY pyproject.toml constraints.txt deploy/docker/requirements.py ./
RUN python -m venv /opt/seedrl

FROM dependencies AS actor-dependencies
RUN python requirements.py actor atari > requirements.txt \
 && pip install --quiet --constraint constraints.txt --requirement requirements.txt

FROM actor-dependencies AS actor-envpool-dependencies
ARG ENVPOOL=envpool==1.2.0
RUN pip install --quiet --constraint constraints.txt "$ENVPOOL"

FROM dependencies AS replay-dependencies
RUN python requirements.py replay > requirements.txt \
 && pip install --quiet --constraint constraints.txt --requirement requirements.txt

FROM dependencies AS torch-dependencies
# PyTorch's index of the build that is wanted (CPU, or a version of CUDA); empty: what pip finds by itself.
ARG TORCH_INDEX_URL=
RUN pip install --quiet --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
RUN python requirements.py inference learner > requirements.txt \
 && pip install --quiet --constraint constraints.txt --requirement requirements.txt

# --- the images
FROM python AS service
COPY deploy/docker/healthcheck.py /opt/healthcheck.py
RUN chmod 0644 /opt/healthcheck.py
LABEL org.opencontainers.image.title="seedrl" \
      org.opencontainers.image.description="SEED RL for PyTorch and Gymnasium" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV SEEDRL_HTTP_HOST=0.0.0.0 \
    SEEDRL_HTTP_PORT=8080 \
    SEEDRL_LOG_FORMAT=json
EXPOSE 8080
WORKDIR /runs
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 CMD ["python3", "/opt/healthcheck.py"]

FROM service AS actor
COPY --from=actor-dependencies /opt/seedrl /opt/seedrl
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps --no-index /wheels/*.whl
USER 10001:10001
ENTRYPOINT ["seedrl", "actor"]

FROM service AS actor-envpool
COPY --from=actor-envpool-dependencies /opt/seedrl /opt/seedrl
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps --no-index /wheels/*.whl
USER 10001:10001
ENTRYPOINT ["seedrl", "actor"]

FROM service AS replay
COPY --from=replay-dependencies /opt/seedrl /opt/seedrl
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps --no-index /wheels/*.whl
USER 10001:10001
ENTRYPOINT ["seedrl", "replay"]

# Inference, learner and TensorBoard have all layers in common, so torch lies on the disk once.
FROM service AS torch
COPY --from=torch-dependencies /opt/seedrl /opt/seedrl
COPY --from=wheel /wheels /wheels
RUN pip install --quiet --no-deps --no-index /wheels/*.whl
USER 10001:10001

FROM torch AS inference
ENV SEEDRL_HOST=0.0.0.0
EXPOSE 50051
ENTRYPOINT ["seedrl", "inference"]

FROM torch AS learner
ENTRYPOINT ["seedrl", "learner"]

FROM torch AS tensorboard
HEALTHCHECK NONE
EXPOSE 6006
ENTRYPOINT ["tensorboard", "--logdir", "/runs", "--bind_all"]
