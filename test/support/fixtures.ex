defmodule Bombus.Fixtures do
  @moduledoc false
  # The checkpoints of test/fixtures, whole and broken.

  @root Path.expand("../fixtures/parity", __DIR__)

  def root, do: @root
  def checkpoint(name), do: Path.join(@root, name)
  def adapter(name, adapter), do: Path.join([@root, name, "adapters", adapter])
  def cases, do: @root |> File.ls!() |> Enum.sort()
  def expected(name), do: name |> checkpoint() |> Path.join("expected.json") |> read_json()

  @doc "The CPU backend, and MLX's CPU device where it is built in."
  def devices, do: if(mlx?(), do: [:cpu, {:mlx, :cpu}], else: [:cpu])

  @doc "Whether MLX is built in."
  def mlx?, do: match?({:ok, _model}, Bombus.load_model(:demo, device: {:mlx, :cpu}))

  @doc "A set-up: a model, and what it scores before anything goes wrong."
  def answering_model(_context) do
    model = Bombus.load_model!(checkpoint("f32-tied"))
    {:ok, before} = Bombus.score(model, [1, 2, 3, 4])
    %{model: model, before: before}
  end

  @doc "Results without what depends on earlier requests: how many tokens were cached."
  def plain(results) when is_list(results), do: Enum.map(results, &plain/1)
  def plain({:error, _error} = error), do: error

  def plain(%{results: [result]}) do
    %{results: [%{result | token_summary: Map.delete(result.token_summary, :cached)}]}
  end

  @doc "Sequences end on the engine's thread, a step after they are told to."
  def assert_soon(fun, tries \\ 500) do
    cond do
      fun.() ->
        :ok

      tries == 0 ->
        ExUnit.Assertions.flunk("it did not happen: #{inspect(Bombus.memory_info())}")

      true ->
        Process.sleep(10)
        assert_soon(fun, tries - 1)
    end
  end

  @doc "What the command `elixir` takes to run a script in a VM of its own, with this Bombus."
  def elixir_arguments(script) do
    ["-pa", Application.app_dir(:bombus, "ebin"), "-e", script]
  end

  @doc "Runs a script in a VM of its own; -> what it wrote, and its status"
  def elixir(script, env \\ []) do
    System.cmd("elixir", elixir_arguments(script), env: env, stderr_to_stdout: true)
  end

  @doc "Another node of a cluster, with these paths; -> who stops it, and its name"
  def start_peer(paths) do
    :os.cmd(~c"epmd -daemon")
    name = :"bombus-#{System.unique_integer([:positive])}@127.0.0.1"
    if not Node.alive?(), do: {:ok, _} = Node.start(name, :longnames)
    paths = Enum.flat_map(paths, &[~c"-pa", &1])

    {:ok, peer, node} =
      :peer.start_link(%{
        name: :peer.random_name(),
        host: ~c"127.0.0.1",
        longnames: true,
        args: [~c"-setcookie", Atom.to_charlist(Node.get_cookie()) | paths]
      })

    {peer, node}
  end

  # What tests run on other nodes, which have this module and none of theirs.

  def stream(serving, input), do: serving |> Bombus.Serving.stream(input) |> Enum.to_list()
  def take(serving, input, n), do: serving |> Bombus.Serving.stream(input) |> Enum.take(n)

  def run_again_and_again(serving, input) do
    Enum.each(1..1000, fn _again -> Bombus.Serving.batched_run(serving, input) end)
  end

  def answer(serving, input, pid) do
    send(pid, {:answer, Bombus.Serving.batched_run(serving, input)})
  end

  def serve(options) do
    {:ok, _} = Application.ensure_all_started(:bombus)
    {:ok, supervisor} = Supervisor.start_link([{Bombus.Serving, options}], strategy: :one_for_one)
    Process.unlink(supervisor)
    :ok = Bombus.Serving.await_ready(options[:name])
  end

  @doc """
  The demo model, dense and with one layer: MLX's CPU device trains it ten times as fast. Always in the
  same folder, since rates of trainings are kept by it.
  """
  def quick_model do
    folder = Path.expand("tmp/quick-model")
    demo = Application.app_dir(:bombus, "priv/models/demo")
    File.rm_rf!(folder)
    File.mkdir_p!(Path.dirname(folder))
    File.cp_r!(demo, folder)

    edit_json(folder, "config.json", fn config ->
      config |> Map.drop(~w(quantization quantization_config)) |> Map.put("num_hidden_layers", 1)
    end)

    {:ok, tensors} = Bombus.Safetensors.read(demo)
    dense = for {name, tensor} <- tensors, not (name =~ ~r/layers\.[1-9]/), do: {name, tensor}
    file = Path.join(folder, "model.safetensors")
    :ok = Bombus.Safetensors.write(file, dense(Map.new(dense)))
    folder
  end

  defp dense(tensors) do
    for {name, tensor} <- tensors, not (name =~ ~r/\.(scales|biases)$/), into: %{} do
      prefix = String.replace_suffix(name, "weight", "")

      case {tensors[prefix <> "scales"], tensors[prefix <> "biases"]} do
        {nil, nil} -> {name, float32(tensor)}
        {s, b} -> {name, float32(Bombus.Quantization.dequantize(tensor, s, b, 64, 4))}
      end
    end
  end

  defp float32(%{type: {:bf, 16}, shape: shape, binary: binary}) do
    wide = for <<half::binary-2 <- binary>>, into: <<>>, do: <<0::16, half::binary>>
    Bombus.Tensor.new({:f, 32}, shape, wide)
  end

  defp float32(tensor), do: tensor

  @doc "A copy of a checkpoint or an adapter that may be broken."
  def copy(folder, dir) do
    target = Path.join(dir, "copy-#{System.unique_integer([:positive])}")
    File.cp_r!(folder, target)
    target
  end

  @doc "A tokenizer with a token for each byte, of which the last two are special."
  def write_byte_tokenizer(folder) do
    tokens = Enum.map(0..253, &byte_token/1)
    special = [{254, "<pad>"}, {255, "<eos>"}]

    vocab =
      tokens
      |> Enum.with_index()
      |> Map.new()
      |> Map.merge(Map.new(special, fn {id, token} -> {token, id} end))

    added =
      for {id, token} <- special do
        flags = Map.new(~w(lstrip normalized rstrip single_word), &{&1, false})
        Map.merge(flags, %{"id" => id, "content" => token, "special" => true})
      end

    bytes = %{
      "type" => "ByteLevel",
      "add_prefix_space" => false,
      "trim_offsets" => false,
      "use_regex" => false
    }

    tokenizer = %{
      "version" => "1.0",
      "added_tokens" => added,
      "pre_tokenizer" => bytes,
      "decoder" => bytes,
      "model" => %{"type" => "BPE", "vocab" => vocab, "merges" => []}
    }

    config = %{
      "tokenizer_class" => "PreTrainedTokenizerFast",
      "eos_token" => "<eos>",
      "pad_token" => "<pad>",
      "chat_template" =>
        "{% for message in messages %}{{ message.role }}: {{ message.content }}<eos>{% endfor %}"
    }

    File.write!(Path.join(folder, "tokenizer.json"), JSON.encode!(tokenizer))
    File.write!(Path.join(folder, "tokenizer_config.json"), JSON.encode!(config))
    folder
  end

  # GPT-2's alphabet: bytes that can be shown stand for themselves.
  defp byte_token(byte) when byte in ?!..?~ or byte in 0xA1..0xAC or byte in 0xAE..0xFF,
    do: <<byte::utf8>>

  defp byte_token(byte) do
    hidden = Enum.count(0..byte//1, &(byte_token_hidden?(&1) and &1 < byte))
    <<256 + hidden::utf8>>
  end

  defp byte_token_hidden?(byte),
    do: byte not in ?!..?~ and byte not in 0xA1..0xAC and byte not in 0xAE..0xFF

  def read_json(path), do: path |> File.read!() |> JSON.decode!()

  def edit_json(folder, name, fun) do
    path = Path.join(folder, name)
    File.write!(path, path |> read_json() |> fun.() |> JSON.encode!())
    folder
  end

  @doc "Rewrites a safetensors file: `fun` maps its header and data to others."
  def edit_tensors(folder, name, fun) do
    path = Path.join(folder, name)
    <<length::little-64, header::binary-size(length), data::binary>> = File.read!(path)
    {header, data} = fun.(JSON.decode!(header), data)
    write_tensors(path, JSON.encode!(header), data)
    folder
  end

  @doc "Tensors as `{name, dtype, shape, data}`, one after another."
  def edit_tensor_list(folder, name, fun) do
    edit_tensors(folder, name, fn header, data ->
      tensors =
        for {name, %{"dtype" => dtype, "shape" => shape, "data_offsets" => [first, last]}} <-
              Map.delete(header, "__metadata__"),
            do: {name, dtype, shape, binary_part(data, first, last - first)}

      layout(fun.(tensors))
    end)
  end

  defp layout(tensors) do
    {entries, {data, _size}} =
      Enum.map_reduce(tensors, {[], 0}, fn {name, dtype, shape, bytes}, {data, start} ->
        stop = start + byte_size(bytes)
        entry = %{"dtype" => dtype, "shape" => shape, "data_offsets" => [start, stop]}
        {{name, entry}, {[data, bytes], stop}}
      end)

    {Map.new(entries), IO.iodata_to_binary(data)}
  end

  def write_tensors(path, header, data) do
    File.write!(path, [<<byte_size(header)::little-64>>, header, data])
  end
end
