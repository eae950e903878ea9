defmodule Bombus.Training.LoRATest do
  # With the real mlx_lm, on the shipped model.
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures}
  alias Bombus.Training.LoRA

  @moduletag :tmp_dir
  @python System.get_env("BOMBUS_PYTHON")

  defp rows(count), do: for(number <- 1..count//1, do: "Post #{number}.")

  defp data(dir, contents, options \\ []) do
    folder = Path.join(dir, "data")
    assert :ok = LoRA.prepare_data(contents, folder, options)
    folder
  end

  defp read(dir, name) do
    text = File.read!(Path.join([dir, "data", name]))
    for line <- String.split(text, "\n", trim: true), do: JSON.decode!(line)["messages"]
  end

  describe "prepare_data" do
    test "writes conversations, most of them to train with", %{tmp_dir: dir} do
      data(dir, rows(20))
      {train, valid} = {read(dir, "train.jsonl"), read(dir, "valid.jsonl")}
      assert {length(train), length(valid)} == {18, 2}

      contents =
        for [
              %{"role" => "user", "content" => "Write a post"},
              %{"role" => "assistant", "content" => content}
            ] <- train ++ valid,
            do: content

      assert Enum.sort(contents) == Enum.sort(rows(20))
      assert contents != rows(20)
    end

    test "takes texts, pairs and conversations, and leaves out what is none", %{tmp_dir: dir} do
      messages = [%{role: :user, content: "Hi"}, %{role: "assistant", content: "Hello there"}]

      contents = [
        "  a text  ",
        %{prompt: "Why?", completion: "Because."},
        %{messages: messages},
        "",
        "   ",
        nil,
        <<255>>,
        %{prompt: "Why?"},
        %{prompt: "Why?", completion: ""},
        %{messages: []},
        %{messages: Enum.take(messages, 1)},
        %{messages: [%{role: "assistant", content: 1}]}
      ]

      data(dir, contents, split_ratio: 1, prompt: "Say")
      assert read(dir, "valid.jsonl") == []

      assert Enum.sort(
               for [one, two] <- read(dir, "train.jsonl"), do: {one["content"], two["content"]}
             ) ==
               [{"Hi", "Hello there"}, {"Say", "a text"}, {"Why?", "Because."}]
    end

    test "shuffles by the seed", %{tmp_dir: dir} do
      order = fn seed ->
        data(dir, rows(30), shuffle_seed: seed)
        read(dir, "train.jsonl")
      end

      assert order.(1) == order.(1)
      assert order.(1) != order.(2)
    end

    test "keeps one to check with, and one to train with", %{tmp_dir: dir} do
      for {count, expected} <- [{1, {1, 0}}, {2, {1, 1}}, {3, {2, 1}}] do
        data(dir, rows(count), split_ratio: 0.9)
        assert {length(read(dir, "train.jsonl")), length(read(dir, "valid.jsonl"))} == expected
      end

      data(dir, rows(3), split_ratio: 0.01)
      assert length(read(dir, "train.jsonl")) == 1
    end

    test "says that nothing is left, and what is wrong", %{tmp_dir: dir} do
      assert LoRA.prepare_data([], dir) == {:error, :no_valid_content}
      assert LoRA.prepare_data(["ab", "cd"], dir, min_length: 3) == {:error, :no_valid_content}

      assert_raise ArgumentError, ~r/:split_ratio/, fn ->
        LoRA.prepare_data(["a"], dir, split_ratio: 2)
      end

      assert_raise ArgumentError, ~r/:prompt/, fn ->
        LoRA.prepare_data(["a"], dir, prompt: nil)
      end

      assert_raise ArgumentError, ~r/ratio/, fn -> LoRA.prepare_data(["a"], dir, ratio: 1) end

      File.write!(Path.join(dir, "file"), "")
      assert {:error, %Error{reason: :io}} = LoRA.prepare_data(["a"], Path.join(dir, "file"))
    end
  end

  defp options(dir, more) do
    Keyword.merge(
      [
        base_model: :demo,
        training_data: Path.join(dir, "data"),
        output_path: Path.join(dir, "adapter"),
        iterations: 2,
        grad_accumulation: 1,
        learning_rate: 1.0e-3,
        max_seq_length: 32,
        steps_per_report: 1,
        steps_per_eval: 100,
        save_every: 1
      ],
      more
    )
  end

  defp train(dir, more) do
    me = self()
    LoRA.train(options(dir, [on_progress: &send(me, {:event, &1})] ++ more))
  end

  defp events do
    receive do
      {:event, event} -> [event | events()]
    after
      0 -> []
    end
  end

  # A training that has begun: its task, and the process of Python.
  defp started(dir, more \\ []) do
    me = self()
    data(dir, rows(4))
    report = &send(me, {:began, &1})
    task = Task.async(fn -> LoRA.train(options(dir, [on_progress: report] ++ more)) end)
    assert_receive {:began, %{type: :start, os_pid: os_pid}}, 5000
    {task, os_pid}
  end

  defp assert_gone(os_pid, tries \\ 100) do
    {_output, status} = System.cmd("kill", ["-0", "#{os_pid}"], stderr_to_stdout: true)

    cond do
      status != 0 -> :ok
      tries == 0 -> flunk("Python is still there")
      true -> Process.sleep(100) && assert_gone(os_pid, tries - 1)
    end
  end

  describe "train" do
    @describetag timeout: 300_000
    @describetag skip: if(@python == nil, do: "BOMBUS_PYTHON names no Python with mlx_lm")

    test "makes an adapter, reports, and goes on from a checkpoint", %{tmp_dir: dir} do
      # These end a line for Python, but not in JSON Lines.
      data(dir, ["One.\u2028Two.\vThree." | rows(2)], split_ratio: 0.7)
      path = Path.join(dir, "adapter")
      assert train(dir, iterations: 1, rank: 4) == {:ok, path}

      assert [
               %{type: :start, iterations: 1},
               %{type: :validation, iteration: 0, loss: first},
               %{type: :train, iteration: 1} = report,
               %{type: :checkpoint, iteration: 1, path: checkpoint}
             ] = events()

      assert is_float(first) and report.loss > 0 and report.tokens_per_second > 0
      assert report.peak_memory > 1_000_000 and report.trained_tokens > 0
      assert checkpoint == Path.join(path, "0000001_adapters.safetensors")
      assert File.read!(Path.join(path, "loss.svg")) =~ "<polyline"

      adapter = Bombus.load_adapter!(path)
      assert {adapter.rank, adapter.scale} == {4, 20.0}
      model = Bombus.load_model!(:demo)
      score = fn adapter -> Bombus.score(model, [5, 6, 7, 8], adapter: adapter) end
      assert {:ok, scored} = score.(adapter)
      assert {:ok, scored} != score.(nil)
      assert score.(Bombus.load_adapter!(checkpoint)) == {:ok, scored}

      assert train(dir, rank: 4, resume_from: path) == {:ok, path}
      resumed = events()
      assert Enum.map(resumed, & &1[:iteration]) == [nil, 1, 2, 2]
      assert File.exists?(Path.join(path, "0000002_adapters.safetensors"))
      assert score.(Bombus.load_adapter!(path)) != {:ok, scored}

      assert {:error, %Error{reason: :already_done}} = train(dir, rank: 4, resume_from: path)

      # What the first run reported is still there, then the second.
      monitored = Enum.to_list(LoRA.monitor_training(path))
      assert List.last(monitored).type == :done
      losses = for %{type: :train} = event <- monitored, do: {event.iteration, event.loss}
      assert [{1, loss}, {2, _other}] = losses
      assert loss == report.loss

      assert %{source: :measured, seconds: seconds} = LoRA.estimate_training_time(10, :demo)
      assert seconds > 0
    end

    test "of DoRA, with a loss that is no number", %{tmp_dir: dir} do
      data(dir, rows(2), split_ratio: 1)
      options = [iterations: 3, learning_rate: 1.0e38, fine_tune_type: :dora, num_layers: 1]
      assert {:error, %Error{reason: :loss_is_nan} = error} = train(dir, options)
      assert error.message =~ "the loss is nan"
      assert error.message =~ "NoNumber"

      assert %{type: :error, reason: "loss_is_nan"} =
               Enum.at(LoRA.monitor_training(Path.join(dir, "adapter")), -1)
    end

    test "onto a full disk", %{tmp_dir: dir} do
      data(dir, rows(2), split_ratio: 1)
      File.mkdir_p!(Path.join(dir, "adapter"))
      File.ln_s!("/dev/full", Path.join(dir, "adapter/.0000001_adapters.part.safetensors"))
      assert {:error, %Error{reason: :disk_full}} = train(dir, num_layers: 1)
    end

    test "that is cancelled, while somebody monitors it", %{tmp_dir: dir} do
      {task, os_pid} = started(dir)
      path = Path.join(dir, "adapter")
      monitor = Task.async(fn -> Enum.to_list(LoRA.monitor_training(path)) end)
      assert {:error, %Error{reason: :busy}} = LoRA.train(options(dir, []))
      assert LoRA.cancel(path) == :ok
      assert_gone(os_pid, 0)
      assert {:error, %Error{reason: :cancelled}} = Task.await(task)
      assert [%{type: :start}, %{type: :cancelled}] = Task.await(monitor)
      assert {:error, %Error{reason: :not_found}} = LoRA.cancel(path)
    end

    test "whose caller dies", %{tmp_dir: dir} do
      Process.flag(:trap_exit, true)
      {task, os_pid} = started(dir)
      Task.shutdown(task, :brutal_kill)
      assert_gone(os_pid)
    end

    test "whose listener raises", %{tmp_dir: dir} do
      data(dir, rows(4))
      me = self()

      listener = fn %{os_pid: os_pid} ->
        send(me, {:os_pid, os_pid})
        raise "enough"
      end

      assert_raise RuntimeError, "enough", fn ->
        LoRA.train(options(dir, on_progress: listener))
      end

      assert_received {:os_pid, os_pid}
      assert_gone(os_pid, 0)
    end

    test "whose Python is killed", %{tmp_dir: dir} do
      {task, os_pid} = started(dir)
      {_output, 0} = System.cmd("kill", ["-KILL", "#{os_pid}"])
      assert {:error, %Error{reason: :training_killed} = error} = Task.await(task)
      assert error.message =~ "signal 9"
    end

    test "whose VM is killed", %{tmp_dir: dir} do
      data(dir, rows(4))
      options = options(dir, []) |> Keyword.delete(:on_progress)

      script = """
      Bombus.Training.LoRA.train(#{inspect(options)} ++ [on_progress: &IO.puts(&1[:os_pid])])
      """

      paths = Enum.flat_map(:code.get_path(), &["-pa", to_string(&1)])
      elixir = System.find_executable("elixir")

      port =
        Port.open({:spawn_executable, elixir}, [
          :binary,
          :exit_status,
          args: paths ++ ["-e", script]
        ])

      {:os_pid, vm} = Port.info(port, :os_pid)
      assert_receive {^port, {:data, line}}, 20_000
      os_pid = line |> String.trim() |> String.to_integer()
      {_output, 0} = System.cmd("kill", ["-KILL", "#{vm}"])
      assert_gone(os_pid)
    end
  end

  describe "train, before it begins" do
    test "finds faults in the data", %{tmp_dir: dir} do
      assert {:error, %Error{reason: :not_found}} = LoRA.train(options(dir, []))
      data(dir, rows(4))

      assert {:error, %Error{reason: :too_few_rows} = error} =
               LoRA.train(options(dir, batch_size: 4))

      assert error.message =~ "3 rows"

      path = Path.join([dir, "data", "train.jsonl"])
      File.write!(path, ~s({"messages": [{}]}\n\n{"text": "a"}\n{broken\n{"a": 1}\n))
      assert {:error, %Error{reason: :bad_training_data} = error} = LoRA.train(options(dir, []))
      assert error.message =~ "line 3" and error.message =~ "mask_prompt"
      assert error.message =~ "line 4: no JSON" and error.message =~ "line 5"
    end

    test "finds no Python, no mlx_lm, no model", %{tmp_dir: dir} do
      data(dir, rows(4))

      assert {:error, %Error{reason: :python_missing} = error} =
               LoRA.train(options(dir, python: "python-9"))

      assert error.message =~ "pip install"

      # A Python without any package.
      python = Path.join(dir, "python")
      File.write!(python, "#!/bin/sh\nexec python3 -I -S \"$@\"\n")
      File.chmod!(python, 0o755)

      assert {:error, %Error{reason: :mlx_lm_missing} = error} =
               LoRA.train(options(dir, python: python))

      assert error.message =~ "pip install"

      assert {:error, %Error{reason: :not_found}} =
               LoRA.train(options(dir, base_model: "no-such-folder"))

      assert {:error, %Error{reason: :not_found}} =
               LoRA.train(options(dir, resume_from: Path.join(dir, "x")))
    end

    test "refuses what is no option", %{tmp_dir: dir} do
      for {key, value} <- [
            iterations: 0,
            rank: 1.5,
            learning_rate: -1,
            dropout: 1,
            fine_tune_type: :full,
            num_layers: 0,
            seed: "a",
            on_progress: 1,
            training_data: nil,
            epochs: 1
          ] do
        assert_raise ArgumentError, ~r/#{key}/, fn -> LoRA.train(options(dir, [{key, value}])) end
      end
    end
  end

  test "the time of a training is guessed from the model's size" do
    small = LoRA.estimate_training_time(100, "someone/Qwen3-0.6B-4bit-never-trained")
    large = LoRA.estimate_training_time(100, "someone/Qwen3-8B-4bit-never-trained")
    assert small.source == :guess
    assert_in_delta large.seconds / small.seconds, 8 / 0.6, 0.01
    folder = LoRA.estimate_training_time(100, Fixtures.checkpoint("f32-dense"))
    assert folder.source == :guess and folder.seconds < small.seconds
  end

  test "a training that never was has no events", %{tmp_dir: dir} do
    assert Enum.to_list(LoRA.monitor_training(dir)) == []
  end
end
