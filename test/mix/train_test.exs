defmodule Mix.Tasks.Bombus.TrainTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO

  alias Mix.Tasks.Bombus.Train

  @moduletag :tmp_dir
  @python System.get_env("BOMBUS_PYTHON")

  @tag skip: if(@python == nil, do: "BOMBUS_PYTHON names no Python with mlx_lm")
  test "from a file of texts to an adapter", %{tmp_dir: dir} do
    texts = Path.join(dir, "posts.txt")
    File.write!(texts, "One post.\n---\nAnother one,\nof two lines.\n---\n\n---\nA third.\n")
    output = Path.join(dir, "adapter")

    arguments =
      ~w(--model demo --texts #{texts} --output #{output} --iterations 1 --rank 2 --num-layers 1
         --fine-tune-type dora --learning-rate 1.0e-3 --max-seq-length 32 --grad-accumulation 1)

    printed = capture_io(fn -> Train.run(arguments) end)
    assert printed =~ "train loss" and printed =~ "The adapter is in #{output}"
    assert Bombus.load_adapter!(output).rank == 2

    count =
      &(File.read!(Path.join([output, "data", &1])) |> String.split("\n", trim: true) |> length())

    assert {count.("train.jsonl"), count.("valid.jsonl")} == {2, 1}
  end

  test "mistakes are said in a line", %{tmp_dir: dir} do
    empty = Path.join(dir, "empty.txt")
    File.write!(empty, " \n---\n")
    given = ["--model", "demo", "--output", dir]

    for {arguments, words} <- [
          {[], "--output"},
          {["--output", dir], "--model"},
          {given, "--data or --texts"},
          {given ++ ["--data", dir], "train.jsonl"},
          {given ++ ["--texts", empty], "no text"},
          {given ++ ["--texts", Path.join(dir, "none")], "no such file"},
          {given ++ ["--data", dir, "--fine-tune-type", "full"], "lora or dora"},
          {given ++ ["--data", dir, "--rank", "0"], ":rank"},
          {given ++ ["--data", dir, "--resume"], "train.jsonl"},
          {given ++ ["--data", dir, "--epochs", "3"], "epochs"},
          {["data"], "data"}
        ] do
      raised = assert_raise Mix.Error, fn -> capture_io(fn -> Train.run(arguments) end) end
      assert Exception.message(raised) =~ words
    end
  end
end
