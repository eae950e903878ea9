defmodule Bombus.ModelTest do
  use ExUnit.Case, async: true

  alias Bombus.{Error, Fixtures, Model}

  test "a model shows what it is" do
    model = Bombus.load_model!(:demo)
    assert %{family: "qwen3", layers: 4, context: 2048} = model.spec
    assert %{bits: 4, group_size: 64, mode: :affine, overrides: overrides} = model.quantization
    assert overrides == %{}
    assert model.device in [:cpu, :gpu]
    assert inspect(model) =~ ~s(family: "qwen3")
    assert inspect(model) =~ "bits: 4"
  end

  test "no device but a card has a faster way that a model could miss" do
    assert %{fallback: nil} = Bombus.load_model!(:demo, device: :cpu).spec
  end

  test "what a load says in the log ends with why steps are slower" do
    native = %{warnings: ["one field is not followed"], fallback: nil}
    assert Model.warnings(native, "mine") == ["one field is not followed"]

    assert ["one field is not followed", slower] =
             Model.warnings(%{native | fallback: "the model has biases"}, "mine")

    assert slower =~ "`mine`"
    assert slower =~ "layer by layer"
    assert slower =~ "the model has biases"
  end

  test "overrides are shown by module path" do
    model = Bombus.load_model!(Fixtures.checkpoint("bf16-overrides"))
    overrides = model.quantization.overrides
    assert %{"model.layers.1.self_attn.q_proj" => nil} = overrides
    assert Enum.any?(overrides, &match?({_path, %{bits: 8, group_size: 32}}, &1))
  end

  test "a dense checkpoint has no quantization" do
    assert Bombus.load_model!(Fixtures.checkpoint("f32-dense")).quantization == nil
  end

  test ":quantization must be the checkpoint's" do
    assert {:ok, _model} = Bombus.load_model(:demo, quantization: :int4)

    assert {:error, %Error{reason: :quantization_mismatch} = error} =
             Bombus.load_model(:demo, quantization: :int8)

    assert error.message =~ "4 bits"
  end

  test "every way to name a device" do
    for options <- [
          [device: :auto],
          [device: :cpu],
          [device: :cpu, threads: 1],
          [device: :cpu, threads: 3],
          [backend: EXLA.Backend],
          [backend: {EXLA.Backend, device: :cpu}],
          [backend: {EXLA.Backend, client: :host}]
        ] do
      assert {:ok, %Model{}} = Bombus.load_model(:demo, options)
    end
  end

  test "MLX's CPU device is there where MLX is built in" do
    case Bombus.load_model(:demo, device: {:mlx, :cpu}) do
      {:ok, model} ->
        assert model.device == {:mlx, :cpu}

      {:error, error} ->
        assert error.reason == :unsupported
        assert error.message =~ "BOMBUS_MLX_DIR"
    end
  end

  test "answers do not depend on the number of threads" do
    ids = for place <- 0..99, do: rem(place * 37, 256)

    answers =
      for threads <- [1, 2, 3] do
        model = Bombus.load_model!(:demo, device: :cpu, threads: threads)
        Bombus.score(model, ids)
      end

    assert [{:ok, _logprobs}] = Enum.uniq(answers)
  end

  @tag :tmp_dir
  test "a checkpoint that shrinks under its model is an error", %{tmp_dir: dir} do
    folder = Fixtures.copy(Fixtures.checkpoint("f32-untied"), dir)
    model = Bombus.load_model!(folder, device: :cpu)
    assert {:ok, _logprobs} = Bombus.score(model, [1, 2, 3])
    File.write!(Path.join(folder, "model.safetensors"), "gone")
    assert {:error, %Error{reason: :io} = error} = Bombus.score(model, [1, 2, 3])
    assert error.message =~ "changed"
    serving = Bombus.Serving.new(model, nil, max_new_tokens: 3)
    assert {:error, %Error{reason: :io}} = Bombus.Serving.run(serving, %{token_ids: [1, 2]})
  end

  test "where there is no GPU, the error says how to get one" do
    case Bombus.load_model(:demo, device: :gpu) do
      {:ok, model} ->
        assert model.device == :gpu

      {:error, error} ->
        assert error.reason == :no_gpu
        assert error.message =~ "mlx-cuda-13"
    end
  end

  test "the bang raises" do
    assert_raise Error, ~r/no folder/, fn -> Bombus.load_model!({:local, "nothing/here"}) end
    assert_raise Error, ~r/no folder/, fn -> Bombus.load_adapter!("nothing/here") end
    assert_raise Error, ~r/no folder/, fn -> Bombus.load_tokenizer!("nothing/here") end
  end

  test "a score has one number less than ids, and each is a log-probability" do
    model = Bombus.load_model!(:demo)
    {:ok, logprobs} = Bombus.score(model, [1, 15, 27, 90])
    assert length(logprobs) == 3
    assert Enum.all?(logprobs, &(is_float(&1) and &1 <= 0.0))
    assert Bombus.score(model, [5]) == {:ok, []}
  end

  test "memory info counts" do
    model = Bombus.load_model!(:demo)
    info = Bombus.memory_info()
    assert info.models >= 1
    assert info.active > 1_000_000
    for key <- [:cached, :peak, :kv, :adapters, :sequences], do: assert(is_integer(info[key]))
    assert {:ok, _logprobs} = Bombus.score(model, [1, 2])
  end
end
