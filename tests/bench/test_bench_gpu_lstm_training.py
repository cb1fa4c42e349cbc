from bench.gpu.bench_lstm_training import summary


def result(group: str, contender: str, device_us: float) -> dict:
    return {"group": group, "extra_info": {"contender": contender, "device_us": device_us, "zeros": 0.5}}


def test_summary_compares_with_cudnn_in_the_same_group() -> None:
    lines = summary([result("a", "nn.LSTM", 30.0), result("a", "80% zeros", 20.0), result("b", "80% zeros", 1234.5)])
    assert [line.split() for line in lines] == [
        ["a"],
        ["nn.LSTM", "50%", "zeros", "30", "us,", "1.00x", "nn.LSTM's", "speed"],
        ["80%", "zeros", "50%", "zeros", "20", "us,", "1.50x", "nn.LSTM's", "speed"],
        ["b"],
        ["80%", "zeros", "50%", "zeros", "1,234", "us,", "nanx", "nn.LSTM's", "speed"],
    ]
    assert summary([]) == []
