# CPU:  docker build -t hotswap .            docker run -p 8000:8000 -v hotswap:/home/hotswap/.hotswap hotswap
#       It listens on all addresses, so it needs a key first: docker run -v hotswap:/home/hotswap/.hotswap hotswap keys create NAME
# GPU:  the same image with `docker run --gpus all`: torch's build for CUDA from the package index is the default one.
# A smaller CPU-only image: docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t hotswap .
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /source
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
COPY requirements.lock ./
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch==2.13.0; fi
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY training training
COPY server server
COPY clients clients
COPY benchmarks benchmarks
RUN pip install --no-cache-dir --constraint requirements.lock .

FROM python:3.11-slim
# The engine compiles its inner loops for the CPU that it finds (docs/decisions/0006); without a compiler it is slower.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 hotswap && install -d -o hotswap /home/hotswap/.hotswap
COPY --from=build /venv /venv
COPY examples /opt/hotswap/examples
ENV PATH=/venv/bin:$PATH HOTSWAP_HOME=/home/hotswap/.hotswap HOTSWAP_SERVE_HOST=0.0.0.0 \
    HOTSWAP_DEMO_EXAMPLES=/opt/hotswap/examples PYTHONUNBUFFERED=1
USER hotswap
WORKDIR /home/hotswap
# Base models, adapters and the database survive the container here.
VOLUME /home/hotswap/.hotswap
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import httpx; httpx.get('http://127.0.0.1:8000/ready').raise_for_status()"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["hotswap"]
CMD ["serve"]
