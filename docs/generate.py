"""Streams an answer from a Tandem router: python generate.py HOST:PORT PROMPT"""

import sys

import grpc
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as rpc


def main(address: str, prompt: str) -> None:
    with grpc.insecure_channel(address) as channel:
        request = pb.GenerateRequest(
            chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
            sampling=pb.SamplingParams(temperature=0, max_tokens=100),
        )
        for response in rpc.InferenceStub(channel).Generate(request, timeout=60):
            if response.HasField("chunk"):
                print(response.chunk.text, end="", flush=True)
            else:
                timeline = response.complete.timeline
                print(f"\n(TTFT {timeline.ttft_ms:.1f} ms, total {timeline.total_ms:.1f} ms)")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
