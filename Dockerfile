# A GPU image: docker build -t dreamer . && docker run --gpus all -v $PWD/logdir:/app/logdir dreamer --configs dmc_vision
# The CUDA libraries come with the torch wheel; the host brings only its driver and the NVIDIA container toolkit.
FROM python:3.11-slim-bookworm

RUN apt-get update && apt-get install -y --no-install-recommends g++ libegl1 libgl1 libosmesa6 && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY requirements.txt ./
COPY requirements requirements
RUN pip install --no-cache-dir -r requirements.txt -r requirements/dmc.txt
COPY . .
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
ENTRYPOINT ["python3", "dreamer.py"]
