# BiasDPO on the CPU: docker build -t biasdpo . && docker run --init -p 7860:7860 -v biasdpo:/data biasdpo
# For a GPU: --build-arg TORCH_INDEX=https://pypi.org/simple, then docker run --gpus all. See docs/space.md.

FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential cmake git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY requirements.txt constraints.txt ./
# llama.cpp for any x86-64 with AVX2 or any ARM64, not only for the machine that builds the image; gradio[oauth] for the sign-in
# of a Docker Space
RUN python -m venv /venv \
    && CMAKE_ARGS=-DGGML_NATIVE=OFF /venv/bin/pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" \
       -r requirements.txt "gradio[oauth]" -c constraints.txt

FROM python:3.12-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 biasdpo && install -d -o biasdpo -g biasdpo /data
COPY --from=build /venv /venv
WORKDIR /app
COPY app.py requirements.txt constraints.txt ./
COPY biasdpo biasdpo
COPY training training
COPY assets assets
COPY docs/privacy.md docs/privacy.md
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    BIASDPO_WORKSPACE=/data
USER biasdpo
VOLUME /data
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/healthz', timeout=4)"]
# --public: everybody compares and judges, nobody does more. Accounts instead: --auth FILE (see docs/security.md).
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860", "--public"]
