defmodule Bombus.Training.LoRATest do
  # With the real mlx_lm, on a part of the shipped model (mix/train_test.exs and the guide train that).
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures}
  alias Bombus.Training.LoRA

  @moduletag :tmp_dir
  @moduletag :capture_log
  @python System.get_env("BOMBUS_PYTHON")

  defp rows(count), do: for(number <- 1..count//1, do: "Post #{number}.")

  defp data(dir, contents, options \\ []) do
    folder = Path.join(dir, "data")
    assert {:ok, _report} = LoRA.prepare_data(contents, folder, options)
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

    defmodule Post do
      defstruct [:id, :body, :prompt, :completion, :messages, :text, __meta__: :loaded]
    end

    test "takes rows as Jason, Ecto and TRL give them", %{tmp_dir: dir} do
      contents = [
        %{"prompt" => "a", "completion" => "1", "id" => 7},
        [prompt: "b", completion: "2"],
        [{"prompt", "c"}, {"completion", "3"}],
        %Post{id: 1, prompt: "d", completion: "4"},
        %{
          "messages" => [%{"role" => "user", "content" => "e"}, [role: :assistant, content: "5"]]
        },
        %Post{messages: [%Post{}, 1]},
        %{
          prompt: [%{role: "user", content: "f"}],
          completion: [%{role: "assistant", content: "6"}]
        },
        %{"text" => "7", "label" => nil},
        %{
          messages: [
            %{
              role: "user",
              content: [%{type: "text", text: "h"}, %{"type" => "text", "text" => "i"}]
            },
            %{role: "assistant", content: ["8"]}
          ]
        },
        %{prompt: nil, completion: nil, messages: nil, text: "9"}
      ]

      assert {:ok, %{train: 9, valid: 0, skipped: 1}} =
               LoRA.prepare_data(contents, Path.join(dir, "data"), split_ratio: 1, prompt: "Say")

      pairs = for [one, two] <- read(dir, "train.jsonl"), do: {one["content"], two["content"]}

      assert Enum.sort(pairs) ==
               [
                 {"Say", "7"},
                 {"Say", "9"},
                 {"a", "1"},
                 {"b", "2"},
                 {"c", "3"},
                 {"d", "4"},
                 {"e", "5"},
                 {"f", "6"},
                 {"hi", "8"}
               ]
    end

    test "keeps tools, their calls and other fields of messages", %{tmp_dir: dir} do
      arguments = [where: "Ulm", at: [hour: 7, day: nil]]
      call = %{id: "1", type: "function", function: %{name: "rain", arguments: arguments}}

      messages = [
        %{role: "user", content: "Rain?"},
        %{role: "assistant", content: nil, tool_calls: [call]},
        %{role: "tool", tool_call_id: "1", content: "none"},
        %{role: "assistant", content: "No.", reasoning_content: "It is dry."}
      ]

      row = %{messages: messages, tools: [%{type: "function", function: %{name: "rain"}}]}
      data(dir, [row], split_ratio: 1)
      text = dir |> Path.join("data/train.jsonl") |> File.read!()
      # The caller's order, else that of OpenAI's documents.
      assert text =~ ~s({"name":"rain","arguments":{"where":"Ulm","at":{"hour":7,"day":null}}})
      row = JSON.decode!(text)
      assert row["tools"] == [%{"type" => "function", "function" => %{"name" => "rain"}}]
      assert [_user, asks, tool, answer] = row["messages"]
      assert asks["content"] == ""
      assert [%{"id" => "1", "function" => %{"name" => "rain"}}] = asks["tool_calls"]
      assert tool["tool_call_id"] == "1"
      assert answer["reasoning_content"] == "It is dry."
    end

    test "takes a stream, whose rows it does not keep", %{tmp_dir: dir} do
      File.write!(Path.join(dir, "posts.txt"), "one\ntwo\n\nthree\n")
      from_file = File.stream!(Path.join(dir, "posts.txt"))
      folder = Path.join(dir, "data")
      assert {:ok, %{train: 2, valid: 1, skipped: 1}} = LoRA.prepare_data(from_file, folder)
      assert {:ok, %{train: 2}} = LoRA.prepare_data(MapSet.new(["a", "b", "c"]), folder)

      rows = Stream.map(1..2000, &String.duplicate(<<?a + rem(&1, 26)>>, 50_000))

      task =
        Task.async(fn ->
          assert {:ok, %{train: 1800}} = LoRA.prepare_data(rows, folder)
          :erlang.garbage_collect()
          {:memory, memory} = Process.info(self(), :memory)
          memory
        end)

      # The rows are 100 MB.
      assert Task.await(task, 60_000) < 10_000_000
      assert File.stat!(Path.join(folder, "train.jsonl")).size > 90_000_000
      assert Enum.sort(File.ls!(folder)) == ["train.jsonl", "valid.jsonl"]
    end

    test "says how many rows were left out, and why", %{tmp_dir: dir} do
      user = %{role: "user", content: "Hi"}
      answer = %{role: "assistant", content: "Hello"}

      wrong = [
        {"the answer is empty", [" ", %{prompt: "a", completion: ""}]},
        {"the text is not valid UTF-8", [<<255>>, %{"text" => <<255>>}]},
        {"the completion is not valid UTF-8", [%{prompt: "a", completion: <<255>>}]},
        {"the prompt is empty", [%{prompt: " ", completion: "a"}]},
        {"it has a prompt and no completion", [%{prompt: "a", completion: nil}]},
        {"it has a completion and no prompt", [%{"completion" => "a"}]},
        {"the completion is no text",
         [%{prompt: "a", completion: 1}, %{prompt: "a", completion: [1 | 2]}]},
        {"messages is empty", [%{messages: []}]},
        {"messages is no list of messages", [%{messages: "Hi"}]},
        {"its last message is not the assistant's", [%{messages: [answer, user]}]},
        {"a message has no role", [%{messages: [%{content: "a"}, answer]}, %{messages: [1]}]},
        {"a message has no content", [%{messages: [%{role: "user", content: nil}, answer]}]},
        {"the content of a message has a part that is no text",
         [
           %{
             messages: [%{user | content: [%{type: "image_url", image_url: %{url: "x"}}]}, answer]
           }
         ]},
        {"it is neither a text nor a row with prompt and completion, messages or text",
         [nil, 1, {:a, :b}, ~c"ab", [], %{}, %{body: "a"}, [1 | 2], self(), Date.utc_today()]},
        {"it has something that is no JSON",
         [
           %{messages: [answer], tools: [self()]},
           %{messages: [answer], tools: [<<255>>]},
           %{messages: [answer], tools: [1 | 2]},
           %{messages: [answer], tools: [%{%{} => 1}]}
         ]}
      ]

      rows = Enum.flat_map(wrong, fn {_reason, rows} -> rows end)
      assert {:ok, report} = LoRA.prepare_data(["fine" | rows], dir)
      assert {report.train, report.valid, report.skipped} == {1, 0, length(rows)}
      assert report.reasons == Map.new(wrong, fn {reason, rows} -> {reason, length(rows)} end)
      assert hd(report.examples) == %{row: 2, reason: "the answer is empty"}
      assert length(report.examples) == 10

      assert {:ok, %{skipped: 0, reasons: reasons, examples: []}} = LoRA.prepare_data(["a"], dir)
      assert reasons == %{}
    end

    test "says that nothing is left, and what is wrong", %{tmp_dir: dir} do
      File.write!(Path.join(dir, "train.jsonl"), "earlier")
      assert {:error, %Error{reason: :no_valid_content}} = LoRA.prepare_data([], dir)

      assert {:error, %Error{reason: :no_valid_content} = error} =
               LoRA.prepare_data(["ab", "cd", nil], dir, min_length: 3)

      assert error.message =~ "rows left out: 3" and error.message =~ "row 1"
      assert error.message =~ "shorter than :min_length (2)"

      assert_raise RuntimeError, "enough", fn ->
        LoRA.prepare_data(
          Stream.map(["a", "b"], &if(&1 == "b", do: raise("enough"), else: &1)),
          dir
        )
      end

      assert File.ls!(dir) == ["train.jsonl"]
      assert File.read!(Path.join(dir, "train.jsonl")) == "earlier"

      for rows <- ["a", %{prompt: "a", completion: "b"}, 1, ["a" | "b"]] do
        assert_raise ArgumentError, ~r/enumerable of rows/, fn -> LoRA.prepare_data(rows, dir) end
      end

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

  # As small as a model can be; what the numbers are matters only where they are compared.
  setup_all do
    :persistent_term.put(__MODULE__, Fixtures.quick_model())
  end

  defp options(dir, more) do
    Keyword.merge(
      [
        base_model: :persistent_term.get(__MODULE__),
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

  defp script(dir, text) do
    path = Path.join(dir, "python-#{System.unique_integer([:positive])}")
    File.write!(path, "#!/bin/sh\n" <> text <> "\n")
    File.chmod!(path, 0o755)
    path
  end

  defp written(dir), do: dir |> Path.join("adapter") |> File.ls!() |> Enum.sort()

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
      folder = :persistent_term.get(__MODULE__)
      model = Bombus.load_model!(folder)
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

      assert %{source: :measured, seconds: seconds} = LoRA.estimate_training_time(10, folder)
      assert seconds > 0
    end

    test "of a family beside Qwen3, whose layers are fused in its files", %{tmp_dir: dir} do
      folder = Fixtures.copy(Fixtures.checkpoint("f32-phi3"), dir)
      Fixtures.write_byte_tokenizer(folder)
      data(dir, rows(2), split_ratio: 1)
      path = Path.join(dir, "adapter")
      assert train(dir, base_model: folder, iterations: 1, rank: 4) == {:ok, path}
      assert [%{loss: loss}] = Enum.filter(events(), &(&1.type == :train))

      assert {:ok, tensors} = Bombus.Safetensors.read(Path.join(path, "adapters.safetensors"))
      assert Map.has_key?(tensors, "model.layers.1.self_attn.qkv_proj.lora_b")
      model = Bombus.load_model!(folder)
      ids = String.to_charlist("Post 1. Post 2.")
      assert {:ok, without} = Bombus.score(model, ids)
      assert {:ok, scored} = Bombus.score(model, ids, adapter: Bombus.load_adapter!(path))
      assert Enum.all?(scored, &is_float/1) and scored != without and loss > 0
    end

    test "of DoRA, with a loss that is no number", %{tmp_dir: dir} do
      data(dir, rows(2), split_ratio: 1)
      options = [iterations: 3, learning_rate: 1.0e38, fine_tune_type: :dora, num_layers: 1]
      assert {:error, %Error{reason: :loss_is_nan} = error} = train(dir, options)
      assert error.message =~ "the loss is nan" and error.message =~ ":learning_rate"
      refute error.message =~ "Traceback"

      assert %{type: :error, reason: "loss_is_nan"} =
               Enum.at(LoRA.monitor_training(Path.join(dir, "adapter")), -1)
    end

    test "onto a full disk", %{tmp_dir: dir} do
      data(dir, rows(2), split_ratio: 1)
      # No file may have more than 16 KiB, which the configuration has not, and the weights have.
      python = script(dir, "ulimit -f 32; exec #{@python} \"$@\"")
      earlier = Path.join(dir, "adapter/adapters.safetensors")
      File.mkdir_p!(Path.dirname(earlier))
      File.write!(earlier, "earlier")
      options = [python: python, rank: 32, overwrite: true]
      assert {:error, %Error{reason: :disk_full} = error} = train(dir, options)
      assert error.message =~ "no room to write `#{dir}/adapter/adapters.safetensors`"
      refute error.message =~ "Traceback"
      assert written(dir) == ~w(adapters.safetensors loss.svg training.jsonl training.log)
      assert File.read!(earlier) == "earlier"
    end

    test "only onto an adapter that may be overwritten", %{tmp_dir: dir} do
      data(dir, rows(2), split_ratio: 1)
      path = Path.join(dir, "adapter")
      File.mkdir_p!(path)
      names = ~w(0000007_adapters.safetensors adapter_config.json adapters.safetensors loss.svg
                 training.jsonl training.log)
      for name <- names, do: File.write!(Path.join(path, name), name)

      untouched? = fn ->
        Enum.all?(names, &(File.read!(Path.join(path, &1)) == &1)) and written(dir) == names
      end

      assert {:error, %Error{reason: :already_there} = error} = train(dir, [])
      assert error.message =~ "overwrite: true" and untouched?.()

      # Starts that fail: before Python, in Python, and once the model is loaded.
      for {options, reason} <- [
            {[python: "python-9"], :python_missing},
            # It ends before it is spoken to.
            {[python: "true"], :training_failed},
            {[python: script(dir, "echo no such thing; exit 1")], :training_failed},
            {[base_model: Path.join(dir, "data")], :not_found},
            {[num_layers: 99], :bad_request}
          ] do
        assert {:error, %Error{reason: ^reason} = error} =
                 train(dir, [overwrite: true] ++ options)

        assert untouched?.()
        # Not what an earlier training has said.
        refute error.message =~ "training.log"
      end

      assert {:ok, path} == train(dir, overwrite: true, iterations: 1)
      refute "0000007_adapters.safetensors" in written(dir)
      assert Bombus.load_adapter!(path).rank == 8
      assert [%{type: :start} | _rest] = Enum.to_list(LoRA.monitor_training(path))
      refute File.read!(Path.join(path, "training.log")) =~ "\e"
    end

    test "that makes things worse, with a warning", %{tmp_dir: dir} do
      data(dir, rows(3))

      {result, log} =
        ExUnit.CaptureLog.with_log(fn -> train(dir, learning_rate: 1.0e6, num_layers: 1) end)

      assert {:ok, path} = result
      assert log =~ "the loss of rows that were trained with"
      assert %{type: :done, warnings: [warning]} = Enum.at(LoRA.monitor_training(path), -1)
      assert warning =~ "lower :learning_rate"
    end

    test "with parts of a content, without a step", %{tmp_dir: dir} do
      File.mkdir_p!(Path.join(dir, "data"))

      write = fn name, content ->
        row = %{
          messages: [%{role: "user", content: "Hi"}, %{role: "assistant", content: content}]
        }

        # As Windows writes it.
        File.write!(Path.join([dir, "data", name]), "\uFEFF" <> JSON.encode!(row) <> "\r\n")
      end

      write.("train.jsonl", [%{type: "text", text: "Hello "}, %{type: "text", text: "there"}])
      write.("valid.jsonl", "Hello there")
      options = [iterations: 1, grad_accumulation: 2, num_layers: 1]

      log =
        ExUnit.CaptureLog.capture_log(fn -> assert {:ok, _path} = train(dir, options) end)

      assert log =~ "make no step"
      events = events()
      [first | _last] = for %{type: :validation} = event <- events, do: event.loss
      # An adapter that has not learned anything changes nothing.
      assert [trained] = for(%{type: :train} = event <- events, do: event.loss)
      assert first > 0
      assert_in_delta trained, first, 1.0e-4
    end

    test "with prompts that fill :max_seq_length", %{tmp_dir: dir} do
      long = String.duplicate("word ", 40)
      rows = [%{prompt: "Why?", completion: "So."}, %{prompt: long, completion: "So."}]
      File.mkdir_p!(Path.join(dir, "data"))
      lines = Enum.map(rows ++ rows, &[JSON.encode!(&1), "\n\n"])
      File.write!(Path.join(dir, "data/train.jsonl"), lines)
      assert {:error, %Error{reason: :bad_training_data} = error} = train(dir, [])
      assert error.message =~ "train.jsonl`, line 3: its prompt has"
      assert error.message =~ "max_seq_length: 32" and error.message =~ "line 7"
      refute error.message =~ "Traceback" or error.message =~ "line 1:"
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

    test "names the line of a wrong row", %{tmp_dir: dir} do
      chat =
        ~s({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})

      pair = ~s({"prompt": "a", "completion": "b"})
      File.mkdir_p!(Path.join(dir, "data"))

      for {lines, words} <- [
            {[chat, chat, pair],
             "line 3: it has prompt and completion where line 1 has messages"},
            {[pair, "", chat], "line 3: it has messages where line 1 has prompt and completion"},
            {[pair, ~s({"prompt": "a"})],
             "line 2: expected messages, prompt and completion, or text"},
            {[pair, pair <> <<255>>], "line 2: no JSON, for it is not valid UTF-8"},
            {[pair, ~s({"prompt": "a)], "line 2: no JSON, it ends too early"},
            {["[", pair, "]"], "line 1: no JSON"},
            {[pair, ~s({"prompt": null, "completion": "b"})], "line 2: prompt is no string"},
            {[pair, ~s({"prompt": "a", "completion": ["b"]})], "line 2: completion is no string"},
            {[~s({"messages": []})], "line 1: messages is no list of messages"},
            {[~s({"messages": [{"content": "a"}]})], "line 1: message 1 has no role"},
            {[~s({"messages": [{"role": "user", "content": 1}]})],
             "line 1: message 1: its content is no text"},
            {[~s({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})],
             ~s(line 1: message 1: a part is of type "image_url")},
            {List.duplicate("x", 9), "line 5: no JSON from byte 1 on; and 4 more"}
          ] do
        File.write!(Path.join(dir, "data/train.jsonl"), Enum.join(lines, "\n"))
        assert {:error, %Error{reason: :bad_training_data} = error} = LoRA.train(options(dir, []))
        assert error.message =~ words
      end

      # More than its format in a row is no fault.
      more = String.replace_suffix(chat, "}", ~s(, "text": "c"}))
      File.write!(Path.join(dir, "data/train.jsonl"), Enum.join([chat, more], "\n"))

      assert {:error, %Error{reason: :python_missing}} =
               LoRA.train(options(dir, python: "python-9"))

      File.rm!(Path.join(dir, "data/train.jsonl"))
      File.mkdir!(Path.join(dir, "data/train.jsonl"))
      assert {:error, %Error{reason: :not_found} = error} = LoRA.train(options(dir, []))
      assert error.message =~ "it is a folder"
      File.rmdir!(Path.join(dir, "data/train.jsonl"))
      {_output, 0} = System.cmd("mkfifo", [Path.join(dir, "data/train.jsonl")])
      assert {:error, %Error{reason: :not_found} = error} = LoRA.train(options(dir, []))
      assert error.message =~ "it is a FIFO"
    end

    test "takes lines of any length that a row may have, and names a longer one", %{tmp_dir: dir} do
      path = Path.join(dir, "data/train.jsonl")
      File.mkdir_p!(Path.dirname(path))
      # Its end lies in a later chunk, and the next begins in that.
      long = JSON.encode!(%{prompt: "a", completion: String.duplicate("b", 1_000_000)})
      File.write!(path, [long, "\r\n", long, "\n", "broken"])
      assert {:error, %Error{reason: :bad_training_data} = error} = LoRA.train(options(dir, []))
      assert error.message =~ "train.jsonl`, line 3: no JSON"

      # It has no end, and costs nothing on the disk.
      File.write!(path, [long, "\n"])
      {:ok, file} = :file.open(path, [:read, :write, :raw])
      {:ok, _end} = :file.position(file, 20_000_000_000)
      :ok = :file.truncate(file)
      :file.close(file)
      assert {:error, %Error{reason: :bad_training_data} = error} = LoRA.train(options(dir, []))
      assert error.message =~ "line 2: it is too long, a line may have 64 MiB"
    end

    test "finds no Python, no mlx_lm, no model", %{tmp_dir: dir} do
      data(dir, rows(4))

      assert {:error, %Error{reason: :python_missing} = error} =
               LoRA.train(options(dir, python: "python-9"))

      assert error.message =~ "pip install"

      # A Python without any package.
      python = script(dir, "exec python3 -I -S \"$@\"")

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

      for {options, words} <- [
            {options(dir, lr: 1), "unknown option :lr, did you mean :learning_rate?"},
            {Map.new(options(dir, [])), "to be a keyword list (key: value), got a map"},
            {options(dir, overwrite: 1), "expected :overwrite to be true or false, got: 1"},
            {options(dir, max_seq_length: 1), "expected :max_seq_length to be"},
            {options(dir, base_model: {:local, 1}), "expected :base_model to be"},
            {Keyword.delete(options(dir, []), :base_model), "expected :base_model to be given"}
          ] do
        raised = assert_raise ArgumentError, fn -> LoRA.train(options) end
        assert raised.message =~ words
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

  describe "monitor_training" do
    test "waits for a training, and says that there is none", %{tmp_dir: dir} do
      raised =
        assert_raise Error, fn -> Enum.to_list(LoRA.monitor_training(dir, timeout: 200)) end

      assert raised.reason == :not_found and raised.message =~ "nothing trains at `#{dir}`"
      assert_raise ArgumentError, ~r/:timeout/, fn -> LoRA.monitor_training(dir, timeout: -1) end

      path = Path.join(dir, "adapter")
      monitor = Task.async(fn -> Enum.to_list(LoRA.monitor_training(path)) end)
      Process.sleep(300)
      data(dir, rows(2))
      python = script(dir, "echo enough; exit 1")

      assert {:error, %Error{}} =
               LoRA.train(options(dir, python: python, on_progress: fn _ -> :ok end))

      assert [%{type: :start}, %{type: :error, reason: "training_failed", message: message}] =
               Task.await(monitor)

      assert message =~ "enough"
      # Again: of the training that is over.
      assert [%{type: :start}, %{type: :error}] = Enum.to_list(LoRA.monitor_training(path))
    end

    test "shows nothing of an earlier training where one runs", %{tmp_dir: dir} do
      data(dir, rows(2))
      path = Path.join(dir, "adapter")
      File.mkdir_p!(path)
      File.write!(Path.join(path, "adapters.safetensors"), "")
      File.write!(Path.join(path, "training.jsonl"), ~s({"type": "done", "path": "earlier"}\n))
      assert [%{type: :done, path: "earlier"}] = Enum.to_list(LoRA.monitor_training(path))

      python = script(dir, "sleep 1; echo enough; exit 1")
      me = self()
      report = &send(me, {:began, &1})

      task =
        Task.async(fn ->
          LoRA.train(options(dir, python: python, overwrite: true, on_progress: report))
        end)

      assert_receive {:began, %{type: :start}}, 5000
      assert [%{type: :start}, %{type: :error}] = Enum.to_list(LoRA.monitor_training(path))
      assert {:error, %Error{reason: :training_failed}} = Task.await(task)
      # That start has failed.
      assert [%{type: :done, path: "earlier"}] = Enum.to_list(LoRA.monitor_training(path))
    end
  end
end
